"""Storage: bytes per token, writing and reading time of tables under the lossless settings that Parquet has.

`fire` is how shards are written now. The others change one thing each: the encoding of lists of floats, that of lists
of ids, the level of zstd, the chunking by content. Per column, the last table says what each costs: bytes per response
token as written now, and the smallest setting found. Every setting is read back and compared. `--run` measures the
tables of a run of your own; the default is synthetic: ids by a Zipf law over 151,936, logprobs and entropies of
distributions drawn at random, whose mantissas, as real ones, do not compress. Times: seconds, writing and reading.

The last part is not lossless: scores whose columns are rounded to so many mantissa bits, as `score.precision: reduced`
does with one number of them. With each its bound of the relative error, and what it does to the coefficients of the
rule `fire`: the mean and the largest change, as a share of the mean coefficient's size, and rows whose `keep` differs.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from weigh import synthetic

import fire_data
from fire_data.precision import reduced
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import SUMMARIES, columns_of, conform
from fire_data.scoring import summarise
from fire_data.shards import parquet_settings

SIZES: measure.Sizes = {
    "rows": (1000, 16, "trajectories"),
    "length": (512, 16, "mean length of a response, tokens"),
    "run": ("", "", "a run directory whose first shards are measured; default: synthetic tables"),
}
VOCABULARY = 151_936
MANTISSA = 23  # bits of a float32
BITS = (7, 8, 9, 10, 11, 12, 14, 16)


def main() -> None:
    options = measure.parse(__doc__ or "", SIZES)
    pa.set_cpu_count(options.threads)
    groups, given = {}, tables(options)
    for name, table in given.items():
        tokens = pc.sum(pc.list_value_length(table[leader(name)])).as_py()
        actions = {c: functools.partial(written, table, s) for c, s in variants(table).items()}
        timed = measure.alternate(actions, options.repeat)
        found: dict[str, dict[str, Any]] = {}
        for case, results in timed.items():
            size = results[0][0]
            found[case] = {
                "seconds": [w + r for _, w, r in results], "write_s": [w for _, w, _ in results],
                "read_s": [r for _, _, r in results], "tokens": tokens, "bytes_per_token": size / tokens,
            }  # fmt: skip
        groups[name] = measure.summarise(found) | {"columns": columns(table, tokens, variants(table))}
    rounded = rounding(given["scores"])
    settings = {k: getattr(options, k) for k in (*SIZES, "repeat", "threads", "smoke")}
    found = {"bench": "storage", "python": platform.python_version(), "settings": settings, "groups": groups}
    print(json.dumps(found | {"rounded": rounded}))
    print("\n".join([*told(groups), *_told_rounded(rounded)]), file=sys.stderr)


def rounding(scores: pa.Table) -> list[dict[str, float]]:
    """Scores whose columns are rounded, exact ones first: bytes per token, and what becomes of the coefficients."""
    tokens = pc.sum(pc.list_value_length(scores["response_ids"])).as_py()
    exact = _coefficients(scores)
    size = np.abs(exact.explode("coefficient")["coefficient"].to_numpy()).mean()
    lines = []
    for bits in (MANTISSA, *BITS):
        table = scores if bits == MANTISSA else summarised(reduced(scores, "scores", bits))
        made = _coefficients(table)
        both = (f.explode("coefficient")["coefficient"].to_numpy() for f in (exact, made))
        off = np.abs(np.subtract(*both, dtype=np.float64)) / size
        lines.append({
            "mantissa_bits": bits, "bytes_per_token": written(table, parquet_settings(table.schema))[0] / tokens,
            "list_bytes": columns(table, tokens, {"fire": parquet_settings(table.schema)})["teacher_logprob"]["fire"],
            "relative_error": 2.0 ** -(bits + 1), "coefficient_mean": float(off.mean()),
            "coefficient_max": float(off.max()), "keep_differs": int((exact["keep"] != made["keep"]).sum()),
        })  # fmt: skip
    return lines


def summarised(table: pa.Table) -> pa.Table:
    """The table with the sums of its columns as they are now."""
    return conform(
        summarise(table.drop_columns([c.name for c in SUMMARIES if c.name in table.column_names])), "scores", ""
    )


def _coefficients(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return fire_data.weigh(frame, "fire", batch_size=64).select("keep", "coefficient").collect()


def _told_rounded(lines: list[dict[str, float]]) -> list[str]:
    names = ("mantissa_bits", "relative_error", "bytes_per_token", "list_bytes", "coefficient_mean", "coefficient_max",
             "keep_differs")  # fmt: skip
    return ["", "".join(f"{n:>18}" for n in names), *("".join(f"{x[n]:>18.4g}" for n in names) for x in lines)]


def told(groups: dict[str, Any]) -> list[str]:
    """The results as a table."""
    lines = []
    for name, group in groups.items():
        lines += ["", f"{name:34}{'bytes/token':>12}{'write s':>10}{'read s':>10}"]
        for case, found in group["cases"].items():
            write, read = (sorted(found[k])[len(found[k]) // 2] for k in ("write_s", "read_s"))
            lines.append(f"  {case:32}{found['bytes_per_token']:>12.3f}{write:>10.3f}{read:>10.3f}")
        lines += ["", f"  {'column':32}{'now':>12}{'smallest':>10}  setting"]
        for column, sizes in group["columns"].items():
            best = min(sizes, key=lambda s: sizes[s])
            lines.append(f"  {column:32}{sizes['fire']:>12.4f}{sizes[best]:>10.4f}  {best}")
    return lines


def variants(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Settings of the writer by name: ours first, then each with one thing changed."""
    ours = parquet_settings(table.schema)
    floats, ids = paths(table, pa.types.is_floating), paths(table, pa.types.is_integer)
    others = [c for c in ours["use_byte_stream_split"] if c not in floats + ids]
    split, words = ours["use_byte_stream_split"], ours["use_dictionary"]
    bare = {k: v for k, v in ours.items() if k != "column_encoding"}
    plain_ids = [c for c in split if c not in ids]
    cases = {
        "fire": ours,
        "floats plain": {**bare, "use_byte_stream_split": [c for c in split if c not in floats]},
        "floats dictionary": {**bare, "use_byte_stream_split": [c for c in split if c not in floats],
                              "use_dictionary": words + floats},
        "ids plain": {**bare, "use_byte_stream_split": plain_ids},
        "ids dictionary": {**bare, "use_byte_stream_split": plain_ids, "use_dictionary": words + ids},
        "ids delta": {**bare, "use_byte_stream_split": plain_ids,
                      "column_encoding": dict.fromkeys(ids, "DELTA_BINARY_PACKED")},
        "ids split by byte": {**bare, "use_byte_stream_split": list(dict.fromkeys([*others, *floats, *ids]))},
        **{f"zstd {level}": {**ours, "compression_level": level} for level in (3, 9, 19)},
        "not compressed": {**ours, "compression": "none", "compression_level": None},
        "chunks not by content": {**ours, "use_content_defined_chunking": False},
    }  # fmt: skip
    needs = {"floats": floats, "ids": ids}
    return {name: s for name, s in cases.items() if needs.get(name.split()[0], True)}


def paths(table: pa.Table, kind: Any) -> list[str]:
    """The Parquet paths of the numbers in columns of lists of such numbers."""
    found = []
    for field in table.schema:
        path, type_ = field.name, field.type
        while pa.types.is_list(type_):
            path, type_ = f"{path}.list.element", type_.value_type
        if path != field.name and kind(type_):
            found.append(path)
    return found


def written(table: pa.Table, settings: dict[str, Any]) -> tuple[int, float, float]:
    """Bytes, and the seconds that writing to and reading from memory took."""
    target, settings = io.BytesIO(), copy.deepcopy(settings)  # pyarrow writes into what it is given
    started = time.perf_counter()
    pq.write_table(table, target, row_group_size=max(1, table.num_rows), **settings)
    middle = time.perf_counter()
    back = pq.read_table(pa.BufferReader(target.getbuffer()))
    ended = time.perf_counter()
    assert back.equals(table), "every setting is lossless"
    return target.getbuffer().nbytes, middle - started, ended - middle


def columns(table: pa.Table, tokens: int, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By column, bytes per token under each setting, without the footer, largest first."""
    found: dict[str, dict[str, float]] = {name: {} for name in table.column_names}
    for case, settings in cases.items():
        target = io.BytesIO()
        pq.write_table(table, target, row_group_size=max(1, table.num_rows), **settings)
        metadata = pq.read_metadata(pa.BufferReader(target.getbuffer()))
        for i in range(metadata.num_columns):
            name = metadata.schema.column(i).path.partition(".")[0]
            size = sum(metadata.row_group(g).column(i).total_compressed_size for g in range(metadata.num_row_groups))
            found[name][case] = found[name].get(case, 0.0) + size / tokens
    return dict(sorted(found.items(), key=lambda item: -item[1]["fire"]))


def leader(table: str) -> str:
    """A column with an element for each response token."""
    return next(c.name for c in columns_of(table) if c.per == "token" and not c.optional)


def tables(options: Any) -> dict[str, pa.Table]:
    """The tables to measure by name."""
    if options.run:
        found = {stage: sorted((Path(options.run) / stage).rglob("*.parquet")) for stage in ("rollouts", "scores")}
        found["weights"] = sorted((Path(options.run) / "weights").rglob("*.parquet"))
        return {name: pq.read_table(files[0]) for name, files in found.items() if files}
    scores = synthetic(Shard(name="00000", start=0, stop=options.rows), options.length, plausible)
    frame = pl.from_arrow(scores)
    assert isinstance(frame, pl.DataFrame)
    made = fire_data.weigh(frame, "fire", batch_size=64).collect()
    names = [c.name for c in columns_of("weights") if c.name in made.columns]
    weights = made.select(names).to_arrow(compat_level=pl.CompatLevel.oldest())
    return {"scores": scores, "weights": conform(weights, "weights", "synthetic weights")}


def plausible(name: str, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Numbers of a token column as real ones are spread: half of the tokens are nearly sure."""
    if name.endswith("_id") or name.endswith("_ids"):
        return np.minimum(rng.zipf(1.2, count), VOCABULARY - 1)
    if "rank" in name:
        return np.minimum(rng.zipf(2.5, count), VOCABULARY)
    size = rng.exponential(size=count) * np.where(rng.random(count) < 0.5, 1e-3, 1.0)
    return (-size if "logprob" in name else size).astype(np.float32)


if __name__ == "__main__":
    main()
