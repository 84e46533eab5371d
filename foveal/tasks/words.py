"""Words for the tasks, all of them from *Moby-Dick* (1851, public domain), which ships with the package."""

import re
from functools import cache

from foveal.data import book

_ADJECTIVES_TEXT = """
ancient awful black blazing blessed blue bold brave bright broad broken brown calm careful certain cheerful clear
clumsy cold common complete cool costly crazy crooked cruel cunning curious damp dark dead deadly deep distant dreary
dull eager early elegant empty enchanted endless enormous entire eternal excellent fair faithful famous fatal fierce
fiery final fine firm fixed floating flying fresh frozen gentle ghostly glad golden good grand grave great green grey
hard hardy heavy hidden hideous hollow holy honest huge humble hungry icy idle imperial invisible jolly joyous keen
kind large lazy lean lively living lonely long loud lovely low lower lucky main mighty mild modern moody mortal mystic
naked narrow native natural noble obvious old open ordinary pale patient peaceful peculiar perilous plain pleasant
pointed polished poor popular precious pretty profound proper proud pure queer quick quiet rare ready red regular
remote rich rolling rough round royal rude sacred sad sailing savage secret separate shallow sharp short silent silver
simple single singular slender slight slow small smooth soft solid solitary spare special speechless steady steep
stern stiff still stormy straight strange strong subtle sudden sunken sweet swift tall tame tender terrible thick thin
tranquil true upper useful vacant vague vast visible warm watery weary white whole wicked wide wild wise wondrous
wooden worthy young
"""
_NOUNS_TEXT = """
altar anchor animal anvil apple arrow artist axe ball barrel basket beach beam bell bench berth billow bird blade
blanket boat bone book boot bottle bowl bow brain branch bread breeze brick brother bucket bull cabin cable canal
candle cannon canoe canvas captain carpenter castle cave chair chapel chart chest child chimney church circle city
clam cloak clock cloud coast coat coffee coffin coin compass cook cord corner cottage crane creature crew crown cup
dagger dart deck desert devil dinner dock doctor dog dolphin door dragon dream eagle ear earth elephant emperor engine
eye face father feather fence field finger fire fish flag flame flask flood floor flower foot fork fountain frame
friend frock garden gate ghost giant glass globe goat gold grass grave gun hair hall hammer hammock hand handle harbor
harpoon hat hawk head heart helm hill hole honey horn horse hospital hour house hull hunter ice iceberg idol inn iron
island ivory jacket jar jaw jewel judge keel key king kitchen knee knife knight ladder lady lake lamp lance lantern
leaf leg letter lid lightning line lion lip lock log lord mast mat mate meadow medal message midnight milk mirror
monster moon morning mother mountain mouth museum nail neck needle nest net night nose oar oak ocean oil orchard
paddle paper parlor path pen pepper pillow pilot pipe pirate pistol planet plank plate pocket poet pole port prairie
priest prince prison purse pyramid quadrant queen rack rail rain razor rib rifle ring river road rock roof room root
rope rose sail sailor salt sand school sea seat shadow shark sheep sheet shelf shell ship shirt shoe shop shore
shoulder shovel silver sister skeleton skin skull sky snow soldier son spade spar spear spring square squid staff star
steel steward stone storm story stove stranger stream street string sun supper sword table tail tea temple tent throne
thunder tiger tooth torch tower town tree trumpet trunk tub turtle valley vessel village voyage wagon wall warrior
watch wave whale wheel widow wind window wing winter woman wood world wreck yard
"""
_FOODS_TEXT = """
beef biscuit bread butter cheese cherries chowder cinnamon clams coffee corn cream ginger grapes honey milk molasses
mustard nutmeg nuts oysters parsley pepper pickles plums pork potatoes sage salt vinegar
"""
_CITIES_TEXT = """
Boston Cologne Constantinople Copenhagen Dover Gibraltar Lima London Nantucket Nineveh Paris Quito Rome Salem Tyre
Venice
"""
_COMMON_TEXT = """
about above after again against all almost alone along already also although always among and another any are because
been before being below between both but came can cannot come could did does done down each either else enough even
ever every few for from gave get give given had has have having her here hers herself him himself his how however into
its itself least less let like made make many may might mine more most much must nay near neither never nevertheless
next none nor not nothing now off often once one only other others ought our ours ourselves out over own perhaps quite
rather said same saw say says seem seemed seems shall she should since some somehow something sometimes soon still
such take than that the thee their them themselves then thence there therefore these they thine this those thou though
through thus thy till too toward towards twas two under until unto upon very was well went were what whatever when
whence whenever where whereas wherever whether which while who whole whom whose why will with within without would yet
yon you your yours yourself
"""

ADJECTIVES, NOUNS, FOODS, CITIES = (
    tuple(t.split()) for t in (_ADJECTIVES_TEXT, _NOUNS_TEXT, _FOODS_TEXT, _CITIES_TEXT)
)
_COMMON = frozenset(_COMMON_TEXT.split())


@cache
def vocabulary() -> tuple[str, ...]:
    """About 12,000 words of 4 to 10 letters that the book writes in lower case, without function words, sorted."""
    words = re.findall(r"(?<![A-Za-z'\u2019-])[a-z]{4,10}(?![A-Za-z'\u2019-])", book())
    return tuple(sorted(set(words) - _COMMON))


@cache
def sentences() -> tuple[str, ...]:
    """The book's sentences with the space that follows each; joined, they are the book."""
    return tuple(re.findall(r".+?(?:[.!?][\"')]*\s+|$)", book(), flags=re.DOTALL))


def magic_key(rng) -> str:
    """An adjective and a noun with a hyphen between, as RULER's keys."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
