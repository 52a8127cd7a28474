"""Writes the demo's utility tasks: ``python -m src.data.demo.build_tasks FOLDER``.

Nine kinds of short task with one checkable answer. The items behind the prompts (words, dates, names, ...) are dealt to
train, calibration and evaluation before any prompt is written, so no item of an evaluation row occurs in training.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COUNTS = {"train": 60, "calib": 12, "eval": 16}
"""Rows per kind in each split."""
SEED = 20261124
MONTHS = "January February March April May June July August September October November December".split()

PLURALS = """
mouse mice;child children;tooth teeth;foot feet;goose geese;man men;woman women;knife knives;leaf leaves;wolf wolves;
city cities;baby babies;box boxes;church churches;potato potatoes;hero heroes;bus buses;dish dishes;fox foxes;
cactus cacti;analysis analyses;crisis crises;thief thieves;half halves;loaf loaves;shelf shelves;calf calves;
lady ladies;party parties;berry berries;story stories;country countries;puppy puppies;watch watches;glass glasses;
brush brushes;match matches;tomato tomatoes;echo echoes;wife wives;life lives;ox oxen;louse lice;person people;
book books;table tables;chair chairs;river rivers;garden gardens;window windows;doctor doctors;farmer farmers;
lamp lamps;cloud clouds;train trains;bridge bridges;house houses;nurse nurses;page pages;horse horses;boy boys;
key keys;monkey monkeys;toy toys;day days;essay essays;fly flies;spy spies;cherry cherries;penny pennies;
factory factories;library libraries;army armies;enemy enemies;body bodies;lily lilies;fairy fairies;pony ponies;
beach beaches;bench benches;peach peaches;branch branches;sandwich sandwiches;class classes;dress dresses;boss bosses;
tax taxes;wish wishes;bush bushes;scarf scarves;elf elves
"""
PAST_TENSES = """
go went;see saw;eat ate;run ran;write wrote;sing sang;drink drank;swim swam;begin began;break broke;speak spoke;
steal stole;choose chose;freeze froze;drive drove;ride rode;rise rose;give gave;take took;shake shook;know knew;
grow grew;throw threw;blow blew;fly flew;draw drew;teach taught;catch caught;buy bought;bring brought;think thought;
fight fought;seek sought;feel felt;keep kept;sleep slept;sweep swept;weep wept;leave left;lose lost;build built;
send sent;spend spent;lend lent;bend bent;find found;wind wound;grind ground;bind bound;stand stood;hold held;
tell told;sell sold;say said;pay paid;lay laid;hear heard;make made;have had;do did;sit sat;win won;dig dug;
hang hung;stick stuck;strike struck;shine shone;wake woke;wear wore;tear tore;swear swore;bear bore;come came;
become became;walk walked;talk talked;jump jumped;play played;study studied;carry carried;stop stopped;plan planned;
visit visited;open opened;dance danced;hope hoped;love loved;cry cried;try tried;hide hid;bite bit;light lit;meet met;
lead led;feed fed;fall fell
"""
PHRASES = """
World Health Organization;Random Access Memory;Frequently Asked Questions;Do It Yourself;Central Processing Unit;
Portable Document Format;Global Positioning System;Automated Teller Machine;Personal Identification Number;
Light Emitting Diode;Liquid Crystal Display;Chief Executive Officer;Estimated Time of Arrival;Human Resources;
Public Relations;Research and Development;Value Added Tax;Gross Domestic Product;International Space Station;
National Basketball Association;Local Area Network;Universal Serial Bus;Virtual Private Network;Read Only Memory;
Graphical User Interface;Application Programming Interface;Hypertext Markup Language;Structured Query Language;
Internet Service Provider;Optical Character Recognition;Digital Video Disc;Compact Disc;Very Important Person;
Bed and Breakfast;Rest In Peace;As Soon As Possible;Be Right Back;For Your Information;Point of View;Terms of Service;
Question and Answer;Rhythm and Blues;Rock and Roll;Unidentified Flying Object;Special Weapons and Tactics;
North Atlantic Treaty;European Union;United Arab Emirates;New South Wales;British Broadcasting Corporation;
Cable News Network;Federal Reserve Bank;Internal Revenue Service;Food and Drug Administration;
Environmental Protection Agency;Small Business Administration;National Park Service;Red Cross Society;
Great Barrier Reef;Blue Ridge Mountains;Golden Gate Bridge;Silver Lake Orchestra;Green Valley School;
Northern Star Bakery;Happy Paws Shelter;Old Town Library;River City Runners;Mountain Bike Club;Junior Chess League;
Autumn Leaf Festival;Community Garden Project;Early Morning Swimmers;Urban Tree Fund;Clean Water Trust;
Open Source Software;Fair Trade Coffee;Solar Power Station;Winter Sports Arena;Local History Museum;
Summer Reading Challenge;Young Writers Award;Modern Dance Theatre;Classic Car Show;City Bus Network;
Regional Rail Service;Digital Skills Academy;Creative Writing Workshop;Weekend Hiking Group;Neighbourhood Watch Team;
Public Speaking Course
"""
NAMES = (
    "Anna Ben Clara David Elena Felix Grace Hugo Irene Jonas Karin Leo Marta Nils Olga Pavel Quinn Rosa Simon Tara "
    "Umar Vera Walter Xenia Yusuf Zoe Amir Bianca Carlos Dina Emil Fatima Georg Hanna Ivan Julia Kofi Lena Miguel Nora"
).split()
CITIES = (
    "Oslo Lima Cairo Porto Kyoto Quebec Dublin Nairobi Vienna Hanoi Bergen Seville Zagreb Austin Perth Geneva Tampere "
    "Leeds Lyon Krakow Malmo Turin Dakar Quito Boston Riga Tunis Accra Basel Ghent"
).split()
DOMAINS = "example.com example.org example.net mail.example shop.example school.example post.example".split()
THINGS = (
    "hotel room,soup,film,phone,concert,train ride,jacket,sofa,museum tour,pizza,headset,novel,hair cut,bike,laptop bag,"
    "yoga class,coffee,boat trip,keyboard,theatre play"
).split(",")
GOOD = (
    "wonderful and worth every penny;better than I had hoped;a delight from start to finish;spotless and comfortable;"
    "simply perfect, I would come again;so good that I told all my friends"
).split(";")
BAD = (
    "awful and far too expensive;a complete waste of money;broken after two days;dull, and I wanted to leave early;"
    "dirty and badly made;so poor that I asked for a refund"
).split(";")

Item = tuple[str, ...]


def _pairs(text: str) -> list[Item]:
    return [tuple(entry.split()) for entry in text.replace("\n", "").split(";")]


def _dates(draw: random.Random, count: int) -> list[Item]:
    days = draw.sample([(y, m, d) for y in range(1950, 2030) for m in range(1, 13) for d in range(1, 29)], count)
    return [(f"{d} {MONTHS[m - 1]} {y}", f"{y}-{m:02}-{d:02}") for y, m, d in days]


def _times(draw: random.Random, count: int) -> list[Item]:
    times = draw.sample([(h, m) for h in range(24) for m in range(60)], count)
    return [(f"{h % 12 or 12}:{m:02} {'am' if h < 12 else 'pm'}", f"{h:02}:{m:02}") for h, m in times]


def _sortings(draw: random.Random, count: int) -> list[Item]:
    lists: dict[tuple[int, ...], list[int]] = {}
    while len(lists) < count:
        numbers = draw.sample(range(1, 100), 4)
        lists.setdefault(tuple(sorted(numbers)), numbers)
    return [(", ".join(map(str, given)), ", ".join(map(str, ordered))) for ordered, given in lists.items()]


def _acronyms(_: random.Random, __: int) -> list[Item]:
    phrases = [phrase.strip() for phrase in PHRASES.replace("\n", "").split(";")]
    return [(phrase, "".join(word[0].upper() for word in phrase.split())) for phrase in phrases]


def _emails(draw: random.Random, count: int) -> list[Item]:
    pairs = draw.sample([(name, city) for name in NAMES for city in CITIES], count)
    return [
        (f"{name} from {city} asked us to reply to {name.lower()}.{city.lower()}@{domain} before noon", address)
        for name, city in pairs
        for domain in [draw.choice(DOMAINS)]
        for address in [f"{name.lower()}.{city.lower()}@{domain}"]
    ]


def _records(draw: random.Random, count: int) -> list[Item]:
    people = draw.sample([(name, city) for name in NAMES for city in CITIES], count)
    ages = [draw.randint(18, 80) for _ in people]
    return [
        (f"{name} is {age} years old and lives in {city}", json.dumps({"name": name, "age": age, "city": city}))
        for (name, city), age in zip(people, ages, strict=True)
    ]


def _reviews(draw: random.Random, count: int) -> list[Item]:
    half = count // 2
    good = draw.sample([(f"The {thing} was {praise}.", "positive") for thing in THINGS for praise in GOOD], half)
    bad = draw.sample([(f"The {thing} was {blame}.", "negative") for thing in THINGS for blame in BAD], count - half)
    return [*good, *bad]


KINDS: dict[str, tuple[Callable[[random.Random, int], list[Item]], Sequence[str]]] = {
    "iso_date": (_dates, ("Write the date {} in ISO format.", "Convert {} to YYYY-MM-DD.", "ISO date for {}?")),
    "clock": (_times, ("Write {} in 24-hour time.", "What is {} on a 24-hour clock?", "Convert {} to 24-hour format.")),
    "sort": (_sortings, ("Sort these numbers from small to large: {}", "Put {} in ascending order.")),
    "plural": (lambda *_: _pairs(PLURALS), ("What is the plural of '{}'?", "Give the plural form of the noun '{}'.")),
    "past": (
        lambda *_: _pairs(PAST_TENSES),
        ("What is the past tense of '{}'?", "Put the verb '{}' in the simple past."),
    ),
    "acronym": (_acronyms, ("Abbreviate '{}' by the first letter of each word.", "Write the initials of '{}'.")),
    "email": (_emails, ("Find the e-mail address: {}.", "Which e-mail address is in this message? {}.")),
    "record": (
        _records,
        ("Turn this into JSON with the keys name, age and city: {}.", "As JSON (name, age, city): {}."),
    ),
    "review": (_reviews, ("Is this review positive or negative? {}", "Label the sentiment of this review: {}")),
}


def build() -> dict[str, list[dict[str, str]]]:
    """All rows of all splits; the same on every machine."""
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in COUNTS}
    for kind, (make, templates) in KINDS.items():
        draw = random.Random(f"{SEED}/{kind}")
        items = make(draw, sum(COUNTS.values()))
        draw.shuffle(items)
        if len(items) < sum(COUNTS.values()):
            raise ValueError(f"{kind}: {len(items)} items are too few")
        dealt = iter(items)
        for split, count in COUNTS.items():
            for number in range(count):
                given, answer = next(dealt)
                prompt = templates[number % len(templates)].format(given)
                row = {"id": f"task/{kind}/{split}/{number:04}", "prompt": prompt, "response": answer, "category": kind}
                splits[split].append(row)
    return splits


def main(folder: Path) -> None:
    """Write ``task.SPLIT.jsonl`` files into the folder."""
    for split, rows in build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"task.{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
