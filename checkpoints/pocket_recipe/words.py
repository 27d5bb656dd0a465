"""The closed word lists of the tasks; the tokenizer gives each of these words few tokens in every letter case."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _listed(
    """
    ant apple arm army baby back bag ball banana bank barn basket bath beach bean bear bed bee bell bench berry
    bike bird black blanket blue boat body book boot bottle bowl box boy branch bread brick bridge broom brown
    brush bucket bug bus bush butter button cake camel camp candle candy cap car carrot castle cat chair cheese
    cherry chicken child circle city clock cloud coat coin cold cook cookie corn cow crab crown cup curtain
    dance deer desk dinner doctor dog doll donkey door dragon dream dress drum duck eagle ear earth egg elephant
    engine eye face family farm farmer father feather fence finger fire fish flag floor flower fly foot forest
    fork fox friend frog fruit game garden gate ghost gift giraffe girl glass glove goat gold goose grape grass
    gray green hair hammer hand hat heart hen hill honey horse hot house ice iron island jacket jam jar jelly
    juice key king kitchen kite kitten knife ladder lake lamp leaf leg lemon letter lion lizard lock lunch
    machine map market mask meal melon milk mirror money monkey moon morning mother mountain mouse mouth mud
    museum music nail neck needle nest net night nose nut ocean onion orange oven owl paint panda pants paper
    park parrot party pasta path peach pear pen pencil pepper phone piano picture pie pig pillow pink pirate
    plane plant plate pocket pond pony potato prince puppy purple queen quiet rabbit radio rain red ribbon rice
    ring river road robot rock roof room root rope rose salt sand scarf school sea seed shark sheep shell ship
    shirt shoe shop silver sister sky small snail snake snow soap sock sofa song soup spider spoon spring
    squirrel star station stone storm story street sugar sun swan sweet table tail tea teacher tent tiger toad
    toast tomato tooth tower town toy train tree truck turtle umbrella valley village violin wagon wall water
    whale wheel white wind window winter wolf wood wool yard yellow zebra zoo
    """
)

NAMES = _listed(
    """
    Ada Alex Amy Anna Ben Bob Carl Clara Dan David Ella Emma Eva Felix Finn Fred Grace Hana Henry Ida Jack Jane
    Jim John Julia Kate Kim Leo Lily Lisa Lucy Mara Mark Max Mia Mike Nina Noah Nora Olga Omar Paul Peter Rosa
    Ruth Sam Sara Sofia Sue Tim Tom Vera Will Zoe
    """
)

CITIES = _listed(
    """
    Amsterdam Athens Berlin Boston Bristol Cairo Chicago Dallas Delhi Denver Dublin Geneva Hamburg Helsinki
    Houston Istanbul Kyoto Lima Lisbon London Lyon Madrid Milan Moscow Munich Nairobi Naples Osaka Oslo Paris
    Porto Prague Quito Rome Santiago Seattle Seoul Sydney Tokyo Toronto Turin Venice Vienna Warsaw Zagreb Zurich
    """
)

JOBS = _listed(
    """
    baker builder butcher chemist clerk cook dentist doctor driver farmer gardener judge lawyer nurse painter
    pilot plumber sailor singer tailor teacher writer
    """
)

COUNTABLES = _listed(
    """
    apples balls bananas books boxes buttons cakes candies coins cookies cups eggs flowers grapes kites lemons
    marbles oranges peaches pears pencils plates rings rocks seeds shells socks stamps stars toys
    """
)
