"""A tour of one run as a marimo notebook: look at the tables, write a rule, compare rules, share what came out.

    marimo edit examples/tour.py                            # interactive, on runs/demo/fire (`make demo` makes it)
    marimo edit examples/tour.py -- --run runs/mine --round 0
    python examples/tour.py --run runs/mine                 # every cell once, as tests do

Without a run it makes a small world first, which takes about half a minute. No model is loaded and nothing is uploaded.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="A tour of one run")


@app.cell
def _():
    import argparse
    from pathlib import Path

    import altair as alt
    import marimo as mo
    import polars as pl

    import fire_data as fd

    return Path, alt, argparse, fd, mo, pl


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    # What did the rule do to my data?

    On-policy distillation has a student write, a teacher score every token, and a *rule* decide what counts. In `fire`
    all of that is a table before anything is trained. This notebook opens one such table and asks it questions. Every
    cell is short and meant to be changed.
    """)
    return


@app.cell
def _(Path, argparse):
    parser = argparse.ArgumentParser(description="a tour of one run")
    parser.add_argument("--run", type=Path, help="a run directory with sealed weights; default: runs/demo/fire")
    parser.add_argument("--round", type=int, default=0, help="the round to look at")
    options = parser.parse_args()
    return (options,)


@app.cell
def _(Path, fd, options):
    def demo() -> Path:
        """The demo's run, made here in a smaller edition if it is not there."""
        if (Path("runs/demo/fire") / "fire.yaml").exists():
            return Path("runs/demo/fire")
        from fire_data.demo.arms import run_demo
        from fire_data.stages import Silent

        return run_demo(Path("runs/tour"), rule="fire", rounds=2, seed=0, report=Silent()).run

    run = fd.open_run(options.run or demo())
    return (run,)


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## A run is a folder of tables

    Each stage of each round has its own. *Sealed* means complete and checked; readers accept nothing else.
    """)
    return


@app.cell
def _(mo, pl, run):
    from fire_data.overview import status

    stages = pl.DataFrame(status(run))
    mo.ui.table(stages)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## One row per trajectory

    `run.weights(NAME)` is the scores joined with what a rule decided, as a Polars `LazyFrame`. Numbers per token are
    lists; sums over a trajectory are columns of their own, so most questions about trajectories read no list at all.
    """)
    return


@app.cell
def _(mo, options, pl, run):
    weights = run.weights(round=options.round)
    trajectories = weights.select(
        "trajectory_id",
        "response",
        "length",
        "reward",
        "keep",
        "drop_reason",
        teacher_mean=pl.col("teacher_logprob_sum") / pl.col("length"),
        reverse_kl=pl.col("teacher_logprob_sum").neg().add(pl.col("student_logprob_sum")) / pl.col("length"),
    ).collect()
    mo.ui.table(trajectories)
    return trajectories, weights


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    FiRe drops the trajectories that the teacher finds least likely. If rewards are there, the table below says whether
    those are the wrong answers. That is the premise of the filter; `fire diagnose` tests it with an interval.
    """)
    return


@app.cell
def _(pl, trajectories):
    filtered = trajectories.group_by("keep").agg(
        pl.len().alias("trajectories"),
        pl.col("teacher_mean").mean(),
        pl.col("length").mean(),
        right=pl.col("reward").mean(),
    )
    filtered.sort("keep")
    return (filtered,)


@app.cell
def _(alt, trajectories):
    alt.Chart(trajectories.select("teacher_mean", "keep")).mark_bar(opacity=0.7).encode(
        alt.X("teacher_mean", bin=alt.Bin(maxbins=40), title="mean log p_T of the trajectory, nats"),
        alt.Y("count()", stack=None, title="trajectories"),
        alt.Color("keep", scale=alt.Scale(range=["#d55e00", "#0072b2"])),
    ).properties(width=560, height=200)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## One row per token

    `fd.explode` turns the lists into rows. The advantage of a token is log p_T − log p_S: where it is negative the
    student overrates the token, and training makes it less likely. The largest lessons of this round:
    """)
    return


@app.cell
def _(fd, pl, run, weights):
    from fire_data.models import load_tokenizer

    tokenizer = load_tokenizer(run.config.student, run.root)
    numbers = ("advantage", "weight", "coefficient", "student_entropy", "teacher_entropy")
    tokens = fd.explode(weights).select("trajectory_id", "position", "response_ids", "keep", *numbers).collect()
    largest = tokens.sort(pl.col("coefficient").abs(), descending=True).head(10)
    text = pl.Series([tokenizer.decode([i]) for i in largest["response_ids"]])
    largest.select("trajectory_id", "position", text.alias("token"), *numbers)
    return (tokens,)


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    FiRe's weight is high where the teacher is sure (low entropy) and the student is not (high entropy): the lower right
    corner. Where do the tokens lie?
    """)
    return


@app.cell
def _(alt, pl, tokens):
    sampled = tokens.filter(pl.col("keep")).sample(min(2000, tokens["keep"].sum()), seed=0)
    alt.Chart(sampled).mark_circle(size=14, opacity=0.5).encode(
        alt.X("student_entropy", title="student entropy, nats"),
        alt.Y("teacher_entropy", title="teacher entropy, nats"),
        alt.Color("weight", scale=alt.Scale(scheme="cividis")),
    ).properties(width=560, height=300)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## Turn a knob

    `fd.weigh` runs a rule on any frame with its columns. It takes no model and no GPU, so a slider will do:
    """)
    return


@app.cell
def _(mo):
    percentile = mo.ui.slider(0, 60, step=5, value=20, label="percentile of trajectories to drop", show_value=True)
    mo.left(percentile)
    return (percentile,)


@app.cell
def _(fd, options, percentile, pl, run):
    scores = run.scores(round=options.round).collect()
    batch_size = run.config.train.batch_size
    turned = fd.weigh(scores, "fire", batch_size=batch_size, percentile=percentile.value)
    turned.select(
        kept=pl.col("keep").mean(),
        kept_tokens=pl.col("length").filter(pl.col("keep")).sum() / pl.col("length").sum(),
        right_among_kept=pl.col("reward").filter(pl.col("keep")).mean(),
        right_among_dropped=pl.col("reward").filter(~pl.col("keep")).mean(),
    ).collect()
    return batch_size, scores


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## Write a rule

    A rule is Polars expressions. `parts()` says what it decides; everything over a step or a round is a `Statistic`,
    so that neither shards nor batches change it. This one lets a token count the more, the further both models are
    apart, up to a cap:
    """)
    return


@app.cell
def _(pl):
    from dataclasses import dataclass

    from fire_data.rules import Parts, Rule, Statistic, plain_advantage

    @dataclass(frozen=True)
    class Surprise(Rule):
        """weight: |log p_T - log p_S| over its mean in the step, at most `cap`."""

        cap: float = 3.0

        def statistics(self) -> tuple[Statistic, ...]:
            return (Statistic("usual", plain_advantage().abs(), "mean", scope="step"),)

        def parts(self) -> Parts:
            return Parts(weight=(plain_advantage().abs() / pl.col("usual")).clip(upper_bound=self.cap))

    return (Surprise,)


@app.cell
def _(Surprise, batch_size, fd, pl, scores):
    surprised = fd.weigh(scores, Surprise(cap=4.0), batch_size=batch_size).collect()
    fd.explode(surprised).select(
        tokens=pl.len(),
        mean_weight=pl.col("weight").mean(),
        at_the_cap=(pl.col("weight") > 3.99).mean(),
        signal_in_the_top_1_percent=pl.col("coefficient").abs().top_k(pl.len() // 100 + 1).sum()
        / pl.col("coefficient").abs().sum(),
    ).collect()
    return (surprised,)


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    In a file, the same class is a rule for every command; `examples/write_a_rule.py` is that file:

    ```sh
    fire weigh RUN --rule examples/write_a_rule.py:Surprise
    ```

    ## Compare rules

    How much would each rule keep, and how far do the coefficients of two of them agree over all tokens? `uniform` is
    plain on-policy distillation, `random` the control that drops as many tokens as `fire`.
    """)
    return


@app.cell
def _(options, pl, run):
    from fire_data.steps.compare import compare

    compared = compare(run, options.round, "uniform,fire,fire-released,tip,random")
    columns = ("rule", "kept_trajectories", "kept_tokens")
    pl.DataFrame([{k: r[k] for k in columns} | {"note": "; ".join(r["flags"].values())} for r in compared["rules"]])
    return (compared,)


@app.cell
def _(compared):
    from fire_data.compare.plot import figure

    figure(compared)
    return


@app.cell(hide_code=True)
def _(mo, run):
    mo.md(f"""
    ## Share it

    One command uploads the tables with a card that says how they were made; they are private until you say otherwise:

    ```sh
    fire push {run.root} your-name/your-dataset
    ```

    Whoever has access trains on them without scoring a token: `fire pull your-name/your-dataset runs/theirs`, or reads
    them with
    `load_dataset("your-name/your-dataset", "scores")`.

    ## From here

    * `fire report {run.root}`: the same questions as a page with a heat map of every token.
    * `fire explain {run.root} 0 max`: every factor of one coefficient.
    * `fire init runs/arm --from {run.root} --rule uniform`: a second arm from the same rollouts, the honest comparison.
    """)
    return


if __name__ == "__main__":
    app.run()
