"""``python tests/benchmarks/tuning.py --run <folder>``: what tuning on one person's nine references adds, by person.

The tuning holds out some of the nine to choose its weights, and does not see the photos that are scored here. The
prompts of these are drawn before it, after it by the photos that it tuned on, and after it by all nine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

from lit_multiip import Personalizer
from lit_multiip.comparison.tables import format_score
from lit_multiip.data.photos import Photo
from lit_multiip.evaluation.critic import SHIPPED, CriticExtractor
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.faces import Dlib, FaceRecognition
from lit_multiip.evaluation.intervals import paired_difference, person_mean
from lit_multiip.pretrained import load_pretrained

LFW_FACE = (0.5, 0.467, 0.747)  # the 112 px around LFW's faces, as shares of the cut photo
REAL, BEFORE, FEWER, ALL = "real held-out photos", "untuned", "tuned, drawn by the tuned", "tuned, drawn by all"


def main() -> None:
    """Tune on people one after another, and print differences with intervals by person."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks/tuning.py", description=__doc__)
    parser.add_argument("--run", required=True, help="a trained run")
    parser.add_argument("--people", type=int, default=30)
    parser.add_argument("--held_out", type=int, default=4, help="photos of a person to compare with")
    parser.add_argument("--side", choices=("validation", "test"), default="validation")
    parser.add_argument("--steps", type=int, nargs="+", help="to choose among, a tuning each; not given: the default")
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[None])
    parser.add_argument(
        "--extractors",
        nargs="+",
        default=list(SHIPPED),
        help="that score: critics, `dlib`, and ONNX files of face networks that see LFW's cut photos as MobileFaceNet "
        "does; the first chooses among weights",
    )
    parser.add_argument("--json", help="a file for every value")
    args = parser.parse_args()
    loaded = load_pretrained(args.run)
    data = loaded.data
    data.tested, data.tested_people, data.held_out = args.side, args.people, args.held_out
    tasks = data.draw_tasks()
    people = list(dict.fromkeys(task.person for task in tasks))
    extractors = [_extractor(name) for name in args.extractors]
    base = Personalizer(loaded, extractors)
    settings = [(n, rate) for n in args.steps or [None] for rate in args.learning_rate]
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds = defaultdict(list)
    for person in people:
        own = [task for task in tasks if task.person == person]
        references, targets = list(dict.fromkeys(own[0].references)), [task.held_out for task in own]
        me = base.with_photos(references, person)
        own_prompts = [photo.prompt for photo in targets]
        real = me.score([photo.image() for photo in targets], targets, own_prompts)
        for score in ("nearest_reference", "prompt"):
            for key in (f"{score}/{extractor.name}" for extractor in extractors):
                if key in real:  # not every extractor reads prompts
                    values[REAL][key].append(real[key])
        _score(values[BEFORE], me, targets)
        for steps, rate in settings:
            tuned = base.with_photos(references, person)
            start = time.perf_counter()
            tuned.tune(steps, rate)
            name = "" if len(settings) == 1 else f" ({steps} steps, {rate})"
            seconds[name].append(time.perf_counter() - start)
            _score(values[FEWER + name], tuned, targets)
            _score(values[ALL + name], tuned.with_photos(references, person), targets)
        first = f"identity_held_out_mean/{extractors[0].name}"
        done = {name: found[first][-1:] for name, found in values.items() if name != REAL}
        print(person, done, flush=True)
    for name, scores in values.items():
        print(f"\n{name}, {len(people)} people x {args.held_out}, seed {data.seed}")
        for score, found in scores.items():
            s = person_mean(found, people)
            line = [str(format_score(s))]
            if name not in (REAL, BEFORE):
                s = paired_difference(found, values[BEFORE][score], people)
                line.append(f"minus untuned {format_score(s, signed=True)}")
            print(f"  {score:34}", *line)
    for name, found in seconds.items():
        print(f"\nseconds a person{name}: {sum(found) / len(found):.1f}, at most {max(found):.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"values": values, "seconds": seconds}), encoding="utf-8")


def _extractor(name: str) -> Extractor:
    """Return what a word of the command line names."""
    if name == "dlib":
        return Dlib()
    return CriticExtractor(name) if name in SHIPPED else FaceRecognition(name, crop=LFW_FACE)


def _score(into: dict[str, list[float]], me: Personalizer, targets: list[Photo]) -> None:
    """Draw each held-out photo's prompt, and keep the scores; identity is to all of them."""
    prompts = [photo.prompt for photo in targets]
    for score, value in me.score(me(prompts, seeds=0), targets, prompts).items():
        into[score].append(value)


if __name__ == "__main__":
    main()
