"""Train a student on a dataset that somebody shared: nothing is sampled or scored, and no teacher is needed.

python examples/train_shared.py user/name runs/shared                       # the student that the dataset names
python examples/train_shared.py user/name runs/shared --student ../small --rule tip
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fire_data.hub.start import start_from
from fire_data.run import open_run
from fire_data.session import Session
from fire_data.stages import Silent
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repository", help="user/name of the dataset on the Hub")
    parser.add_argument("run", type=Path, help="the run directory that is made")
    parser.add_argument("--student", help="the model that wrote the responses: Hub id or folder")
    parser.add_argument("--rule", default="uniform", help="as for `fire weigh --rule`")
    options = parser.parse_args()
    number = start_from(options.run, f"hf://datasets/{options.repository}", options.student, None, Silent())
    run = open_run(options.run, (f"weigh.rule={options.rule}",))
    weights = weigh(run, number)
    with Session(run) as session:
        trained = train(session, number)
    kept = weights.stats["kept_tokens"] / weights.stats["tokens"]
    print(f"{options.rule}: {kept:.0%} of the tokens kept, {trained.stats['steps']} optimizer steps")
    print(run.part("checkpoints", number).folder)


if __name__ == "__main__":
    main()
