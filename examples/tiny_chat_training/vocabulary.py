"""The words tiny-chat is trained on: typed here or composed from syllables, taken from no data set."""

import string
from random import Random

_WORDS = """
able acorn actor agree air album alley amber anchor angle ankle apple apron arch arrow atlas attic autumn award
axle baby bacon badge bagel baker balloon bamboo banana band banner barley barn barrel basket beach beacon bean
bear beaver bed bee beetle bell belt bench berry bicycle bird biscuit blanket blossom boat bone book boot border
bottle boulder bowl box branch brass bread brick bridge broom brother brush bubble bucket butter button cabbage
cabin cactus cake camel camera candle candy canoe canyon cap captain car caravan carpet carrot castle cat cave
cedar cellar chain chair chalk cheese cherry chess chicken chimney circle circus citrus city clay cliff clock
cloud clover coach coal coast coat cobra coffee coin collar comet compass copper coral corn cottage cotton couch
cousin cradle crane crater crayon cricket crown crystal cup curtain cushion dairy daisy dance dawn deer delta
desert desk dew diamond dinner dish dock doctor dog dolphin donkey door dove dragon drawer dream dress drum duck
dune eagle ear earth easel echo eel egg elbow elephant elm ember engine evening falcon family fan farm feather
fence fern ferry fiddle field fig finch finger fire fish flag flame flask flock floor flower flute foam fog
folder forest fork fossil fountain fox frame frog frost fruit furnace galaxy garden garlic gate geyser ghost
giant ginger giraffe glacier glass glove goat gold goose grain grape grass gravel guitar hail hallway hammer
hammock harbor harp harvest hat hawk hazel hedge helmet hen herb heron hill hinge hive hobby honey hood hook
horizon horse hotel house hurdle ice igloo inch ink insect iris iron island ivory ivy jacket jaguar jam jar
jasmine jelly jewel jigsaw jungle juniper kayak kettle key kitchen kite kitten knee knife knot ladder lagoon
lake lamp lantern lark laundry lava lawn leaf leather lemon lens letter lettuce library lighthouse lily lime
linen lion lizard lobster log lotus lunch magnet mango maple marble market marsh mask meadow medal melon meteor
mill minute mirror mitten monkey moon morning moss moth motor mountain mouse mouth mud muffin museum mushroom
music napkin needle nest net nickel night noodle north notebook nut oak oar oasis oatmeal ocean office olive
onion opal opera orange orbit orchard orchid otter oven owl oyster paddle page paint palace palm panda panther
paper parade parallel parcel park parrot pasta path peach peacock peanut pear pebble pelican pen pencil penguin
pepper piano picnic pigeon pillow pilot pine pirate planet plate plum pocket pond pony poplar poppy potato
prairie prism puddle pumpkin puppet puzzle pyramid quail quartz queen quilt rabbit raccoon radio radish raft
rain rainbow raven ribbon rice ring river road robin rocket roof room rope rose ruby ruler saddle saffron sail
salad salmon salt sand sandal satin sauce scarf school scissors sea season seed shadow shark sheep shell shield
ship shirt shoe shore shovel silk silver sister skate sky sled sleeve slipper smoke snail snow soap sock sofa
soup south spark sparrow spice spider spinach spiral spoon spring square squirrel stable stair star station
stone storm stove straw stream street string sugar summer sun swan sweater table tablet tailor tea teapot
temple tent thimble thread thunder tiger timber toast tomato torch tower town train tree trumpet tulip tunnel
turnip turtle umbrella uncle valley vanilla vase velvet village vine violet violin volcano wagon wall walnut
walrus water wave wax weather well whale wheat wheel whistle willow wind window wing winter wolf wood wool
world yard yarn year yogurt zebra zipper
"""
WORDS = tuple(_WORDS.split())

_NAMES = """
Ada Adam Alice Amara Amir Ana Anton Aria Asha Ben Bella Boris Bruno Carla Cem Chen Clara Cora Dana David Dina
Diego Edda Eli Elena Emil Emma Esra Eva Fatima Felix Finn Flora Frank Gina Greta Hana Hans Hugo Ian Ida Ines
Iris Ivan Jack Jana Joel John Jonas Julia Kai Karim Kate Kenji Lara Lea Leo Liam Lina Lola Luca Lucy Maja Marco
Maria Mark Mary Max Maya Mia Mila Nadia Nina Noah Nora Olga Oliver Omar Otto Paul Petra Pia Priya Rana Rosa
Ruth Sam Sara Sofia Tara Theo Tim Tom Uma Vera Victor Wanda Yara Yusuf Zoe
"""
NAMES = tuple(_NAMES.split())

COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "brown", "black", "white", "pink", "gray", "gold")

_CITIES = """
Accra Athens Austin Berlin Boston Cairo Delhi Dublin Geneva Hanoi Havana Kyoto Lagos Lima Lisbon London Madrid
Milan Mumbai Nairobi Oslo Paris Porto Prague Quito Rome Seoul Sydney Tokyo Toronto Vienna Warsaw Zurich
"""
CITIES = tuple(_CITIES.split())

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"


def any_word(rng: Random) -> str:
    """Return a word of 1 to 12 letters: a real one, one of syllables, or random letters."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(WORDS)
    if kind < 0.7:
        return pseudo_word(rng)
    letters = rng.sample(string.ascii_lowercase, k=rng.randint(2, 26))  # few letters: many repeats to count
    return "".join(rng.choices(letters, k=rng.randint(1, 12)))


def any_name(rng: Random) -> str:
    """Return a first name, typed above or composed, so that no list of names is enough to remember by."""
    return rng.choice(NAMES) if rng.random() < 0.3 else pseudo_word(rng).capitalize()


def any_city(rng: Random) -> str:
    """Return the name of a place, typed above or composed."""
    return rng.choice(CITIES) if rng.random() < 0.3 else pseudo_word(rng).capitalize()


def pseudo_word(rng: Random) -> str:
    """Return a word that can be said aloud: one to four syllables, 2 to 12 letters."""
    return "".join(_syllable(rng) for _ in range(rng.randint(1, 4)))


def _syllable(rng: Random) -> str:
    ending = rng.choice(_CONSONANTS) if rng.random() < 0.3 else ""
    return rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + ending
