"""`--flat`: scores and weights of a round as one table, for people who want one row with everything.

It is made for a push and is no stage of the run: whatever it says, the two tables say.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from fire_data import files
from fire_data.hub.layout import FLAT, part_of
from fire_data.run import Run
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest, Receipt, digest
from fire_data.schemas.tables import FORMAT
from fire_data.shards import Part, read_shard, sealed, versions, write_parquet


def flat_fields(scores: Manifest, weights: Manifest) -> dict[str, object]:
    """What the joined table is made of."""
    return {"format": FORMAT, "scores": scores.digest, "weights": weights.digest}


def write_flat(run: Run, weights: Manifest, folder: Path) -> tuple[Manifest, dict[str, Path]]:
    """The joined table of one round under `folder`: its manifest, and its files by their path in the repository.

    Raises DataError if the two tables are not about the same rows, and as `read_shard`.
    """
    scores_part, weights_part = run.part("scores", weights.round), part_of(run.root, weights)
    scores = sealed(scores_part)
    fields = flat_fields(scores, weights)
    target = Part(folder, FLAT, weights.round, weights.name)
    receipts, made = [], {}
    for left, right in zip(scores.shards, weights.shards, strict=True):
        table = _joined(scores_part, left, weights_part, right)
        file = target.file(right.shard)
        files.make_folder(file.parent)
        write_parquet(file, table, digest(fields))
        receipts.append(right.model_copy(update={
            "sha256": files.sha256_file(file), "bytes": file.stat().st_size, "fingerprint": digest(fields),
            "versions": versions(), "seconds": 0.0,
        }))  # fmt: skip
        made[file.relative_to(folder).as_posix()] = file
    manifest = Manifest(
        stage=FLAT, name=weights.name, round=weights.round, state="sealed", fingerprint=digest(fields), fields=fields,
        plan=weights.plan, shards=tuple(receipts),
    )  # fmt: skip
    return manifest, made


def _joined(scores_part: Part, left: Receipt, weights_part: Part, right: Receipt) -> pa.Table:
    scores, weights = read_shard(scores_part, left), read_shard(weights_part, right)
    if scores["trajectory_id"] != weights["trajectory_id"]:
        text = f"shard {right.shard} of weights and scores are about different trajectories"
        raise DataError(text, where=weights_part.label, fix=f"{weights_part.command} --redo")
    for column in weights.column_names[1:]:
        scores = scores.append_column(weights.schema.field(column), weights[column])
    return scores
