"""Write a small, reproducible dataset of requests to an assistant and the calls that carry them out."""

import json
import random
import sys
from pathlib import Path

THINGS = ["water the plants", "call Ada", "buy bread", "feed the cat", "pay the rent", "back up the disk",
          "book a train", "send the report", "visit Grace", "clean the oven", "charge the bike"]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ROOMS = ["kitchen", "office", "hall", "bedroom", "garage", "studio", "attic", "cellar"]
SONGS = ["Blue in Green", "Clair de lune", "Heroes", "So What", "Hyperballad", "Rhapsody in Blue", "Teardrop"]


def remind(rng: random.Random) -> tuple[str, str]:
    thing, day, hour = rng.choice(THINGS), rng.choice(DAYS), rng.randint(1, 12)
    half, minute = rng.choice(["am", "pm"]), rng.choice([0, 15, 30, 45])
    said = f"{hour}:{minute:02d}{half}" if minute else f"{hour}{half}"
    asked = rng.choice([
        f"Remind me to {thing} on {day} at {said}", f"On {day} at {said} I have to {thing}, don't let me forget",
        f"{day}, {said}: {thing}",
    ])  # fmt: skip
    hour24 = hour % 12 + (12 if half == "pm" else 0)
    return asked, f'remind("{thing}", day="{day}", time="{hour24:02d}:{minute:02d}")'


def light(rng: random.Random) -> tuple[str, str]:
    room, level = rng.choice(ROOMS), rng.choice(range(0, 101, 5))
    asked = rng.choice([
        f"Set the light in the {room} to {level} percent", f"{level}% light in the {room} please",
        f"I'd like the {room} at {level} percent brightness",
    ])  # fmt: skip
    return asked, f'light("{room}", level={level / 100:g})'


def play(rng: random.Random) -> tuple[str, str]:
    song, room, times = rng.choice(SONGS), rng.choice(ROOMS), rng.choice([1, 1, 2, 3])
    often = {1: "", 2: " twice", 3: " three times"}[times]
    asked = rng.choice([f"Play {song} in the {room}{often}", f"I want to hear {song}{often} in the {room}"])
    return asked, f'play("{song}", room="{room}"' + (f", times={times})" if times > 1 else ")")


def main() -> None:
    """Write train.jsonl and test.jsonl, which share no question, to the given folder."""
    folder, rng = Path(sys.argv[1]), random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, str] = {}
    while len(made) < 432:
        asked, call = rng.choice([remind, light, play])(rng)
        made.setdefault(asked, call)
    records = [{"prompt": f"{asked}\n", "completion": call} for asked, call in made.items()]
    for name, part in (("train", records[:400]), ("test", records[400:])):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
