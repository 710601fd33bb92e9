# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the recall tasks."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """quiet ancient brave bright broken calm careful clever cold crooked curious dusty
    early eager elegant empty faded famous fierce fragile frozen gentle giant grand happy
    hidden hollow honest humble jolly kind large late little lonely loud lucky mighty
    modern narrow noble northern odd pale patient plain polished proud quick rare rough
    rusty shallow sharp shiny silent simple slow small smooth solid southern steep stormy
    strange sturdy sweet tall tender thin tiny tired vast warm western wild wise young"""
)
COLOURS = _words(
    """red blue green yellow orange purple black white grey brown pink golden silver
    scarlet crimson amber violet turquoise ivory teal"""
)
OBJECTS = _words(
    """lantern compass violin kettle ladder mirror hammer basket blanket candle clock
    crown drum feather flute globe helmet jacket jar key kite lamp map medal necklace
    notebook painting pearl pencil piano pillow puzzle radio ring robe rope saddle scarf
    shield spoon statue stool sword table telescope ticket trumpet umbrella vase wagon
    wallet whistle window anchor barrel bell bicycle bottle bracelet bucket camera
    carpet chair chest coin cup desk diary door engine envelope"""
)
PLACES = _words(
    """library cellar garden kitchen attic harbour market museum station tower bakery
    bridge castle chapel college cottage factory farm forest garage gallery hospital
    hotel island lighthouse mill office palace park pharmacy school stable stadium
    studio temple theatre tunnel valley village warehouse workshop yard"""
)
FIRST_NAMES = _words(
    """Alice Bruno Clara Daniel Elena Felix Grace Henry Irene Jonas Karen Louis Maria
    Nathan Olivia Peter Quinn Rosa Samuel Teresa Ursula Victor Wendy Xavier Yvonne Zachary
    Amina Boris Carmen Dmitri Esther Farid Gloria Hassan Ingrid Javier Keiko Lars Mina
    Nora Oscar Priya Rafael Sofia Tomas Vera Walter Yusuf"""
)
SURNAMES = _words(
    """Abbott Barnes Carter Dawson Ellis Foster Griffin Harris Ingram Jensen Keller Lawson
    Miller Norris Owens Parker Quincy Ramsey Sutton Turner Vaughn Walker Young Zimmer
    Archer Bishop Collins Dixon Erikson Fisher Gibson Holmes Irving Jordan Knight Lopez
    Mendez Novak Olsen Palmer Reyes Santos Tanaka Usman Vargas Weber"""
)
PROFESSIONS = _words(
    """teacher doctor painter baker sailor farmer lawyer pilot nurse carpenter engineer
    gardener musician plumber poet soldier tailor writer chemist dentist editor judge
    librarian mechanic merchant miner clerk guard cook driver"""
)
EVENTS = _words(
    """festival wedding concert parade auction lecture ceremony election exhibition
    funeral holiday meeting picnic race rehearsal strike storm tournament trial banquet"""
)
TIMES = (
    "in the morning", "late at night", "on Monday", "on Tuesday", "on Friday",
    "last winter", "last summer", "every spring", "before noon", "after lunch",
    "at dawn", "at midnight", "years ago", "this week", "on Sunday", "in March",
    "in October", "once again",
)  # fmt: skip
ADVERBS = _words("quickly slowly gladly often rarely never always quietly suddenly carefully")
VERBS = _words(
    """carried cleaned repaired painted sold bought moved lifted found lost borrowed
    described admired ignored measured opened closed guarded returned hid"""
)
VERBS_SAY = _words("said thought believed wrote heard knew hoped learned noticed guessed")
VERBS_GO = _words("walked travelled hurried returned drove ran sailed wandered")
WEATHER = _words("rain snow wind fog sunshine thunder hail frost")
FOODS = _words("bread soup cheese apples coffee rice honey fish butter salad tea cake")
UNITS = _words("metres kilograms litres hours minutes miles coins pages")
ATTRIBUTES = (
    "access code", "serial number", "secret word", "tracking number",
    "invoice number", "safe combination", "room number", "radio channel",
)  # fmt: skip
VALUE_WORDS = _words(
    """falcon marble copper willow thunder velvet saffron cobalt juniper walnut pepper
    sable ginger coral meadow glacier canyon ember maple cedar orchid lotus tiger otter
    badger raven heron salmon panther beetle cricket dragon wizard comet planet rocket
    magnet prism quartz opal topaz jasper basil clover fennel nectar pollen summit"""
)
