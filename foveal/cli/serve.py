"""`foveal serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .shared import (
    BudgetText,
    Device,
    Dtype,
    MethodName,
    Model,
    ProfileFile,
    app,
    budget_value,
    errors,
    split_values,
)


@app.command()
def serve(
    model: Model = None,
    method: MethodName = None,
    budget: BudgetText = None,
    profile: ProfileFile = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help='A method requests may ask for, as NAME or NAME=SPEC: "half=snapkv(budget=0.5)". Repeatable.'
        ),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Comma-separated budgets requests may ask for.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than this machine's own it needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FOVEAL_API_KEY", help="A key callers must have; repeatable. The variable hides it from ps."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line.")] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen beyond this machine although nobody needs a key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name the server is reached by; repeatable.")
    ] = None,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Show /metrics without a key.")] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: its id.")] = None,
    memory: Annotated[float, typer.Option(help="GiB for all caches together.")] = 2.0,
    context: Annotated[int | None, typer.Option(help="Most tokens of a conversation; default: the model's.")] = None,
    max_running: Annotated[int, typer.Option(help="Requests that decode together.", min=1)] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=1)] = 64,
    max_per_key: Annotated[int | None, typer.Option(help="Requests one key may have at once.", min=1)] = None,
    max_choices: Annotated[int, typer.Option(help="Answers one request may ask for: n times its prompts.", min=1)] = 8,
    deadline: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    image_hosts: Annotated[
        str | None,
        typer.Option(help="Comma-separated hosts from which images are fetched by https; default: data: URLs alone."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Deploy on Ray Serve, on the cluster of $RAY_ADDRESS or here.")
    ] = False,
    replicas: Annotated[
        str | None, typer.Option(help="With --ray: how many engines, as 2 or as 1-8 to follow the load; default: 1.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Processes that hold the model together, a GPU or a part of the cores each.", min=1)
    ] = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model behind OpenAI's API, with a chat page at /; each head keeps only the keys its method keeps."""
    try:
        from ..serve import run
        from ..serve.launch import Plan
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed, which serving needs: pip install 'foveal[serve]'") from None

    plan = Plan(
        model=model,
        method=method,
        budget=budget_value(budget, "--budget"),
        profile=None if profile is None else str(profile),
        allow=tuple(allow or ()),
        budgets=tuple(budget_value(b, "--budgets") for b in split_values(budgets, "budgets")),
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        api_key_file=None if api_key_file is None else str(api_key_file),
        without_key=without_key,
        allowed_hosts=tuple(allowed_host or ()),
        open_metrics=open_metrics,
        name=name,
        memory=memory,
        context=context,
        max_running=max_running,
        max_waiting=max_waiting,
        max_per_key=max_per_key,
        max_choices=max_choices,
        deadline=deadline,
        device=device,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        image_hosts=tuple(split_values(image_hosts, "image-hosts")),
    )
    plan.check()
    if replicas is not None and not ray:
        raise InputError("--replicas are Ray's: add --ray, or leave it out")
    if image_hosts is not None and ray:
        raise InputError("--image-hosts are for one server: images are not read with --ray, so leave one of them out")
    if ray:
        from ..serve.cluster import serve_on_ray

        serve_on_ray(plan, replicas or "1")
        return
    run.tolerate_full_disk()
    listener = run.inherited()
    if listener is None:
        listener = run.listen(host, port)
        errors.print(f"[dim]loading the model for http://{plan.authority} ...[/]", highlight=False)
        run.log_to_stderr()
        raise typer.Exit(run.supervise(listener, sys.argv[1:]))
    plan.serve(listener, lambda sentence: errors.print(sentence, highlight=False, markup=False, soft_wrap=True))
