// What of Apache ECharts 6.1.0 (ZRender 6.1.0, tslib 2.3.0) the report page carries; the build of echarts.min.js:
//   npm install echarts@6.1.0 esbuild@0.28.2
//   npx esbuild echarts.entry.js --bundle --minify --format=iife --global-name=echarts --target=es2020 \
//     --legal-comments=none --define:process.env.NODE_ENV='"production"' --outfile=echarts.min.js \
//     --banner:js='/*! Apache ECharts 6.1.0, selected modules, minified. Apache-2.0; parts BSD-3-Clause and 0BSD: see ECHARTS-LICENSES.txt. */'
export { init } from "echarts/core";
import { use } from "echarts/core";
import { CustomChart, LineChart } from "echarts/charts";
import { GridComponent, MarkLineComponent, TooltipComponent } from "echarts/components";
import { SVGRenderer } from "echarts/renderers";

use([LineChart, CustomChart, GridComponent, TooltipComponent, MarkLineComponent, SVGRenderer]);
