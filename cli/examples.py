"""The examples at the end of every help page: one run, `runs/mine`, from its first prompts to what is shared of it.

A line is a command and, in a few words, why one would give it. All of them fit into a terminal of 80 columns, since a
command that is broken over two lines cannot be copied.
"""

from __future__ import annotations

Example = tuple[str, str]

EXAMPLES: dict[str, tuple[Example, ...]] = {
    "": (
        ("fire demo runs/demo", "the whole loop on a small world, on a CPU"),
        ("fire init runs/mine --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B", ""),
        ("fire run runs/mine --rounds 10", "all stages, 10 times"),
        ("fire weigh -h", "the options of a command, with examples"),
    ),
    "init": (
        ("fire init runs/mine --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B", ""),
        ("fire init runs/mine --student ../small --prompts prompts.jsonl --raw", ""),
        ("fire init runs/fire --from runs/mine --rule fire", "a second arm"),
    ),
    "rollout": (
        ("fire rollout runs/mine", "again: it goes on"),
        ("fire rollout runs/mine --set rollout.engine=vllm", "vLLM writes"),
        ("fire rollout runs/mine --ray", "engines on a cluster"),
        ("fire rollout runs/mine --redo", "anew; nothing is deleted"),
    ),
    "score": (
        ("fire score runs/mine", "student and teacher, every token"),
        ("fire score runs/mine --add topk", "and the most likely tokens of both"),
        ("fire score runs/mine --teachers all", "of several: side by side"),
    ),
    "weigh": (
        ("fire weigh runs/mine", "the run's rule"),
        ("fire weigh runs/mine --rule fire -p percentile=30 --name p30", ""),
        ("fire weigh runs/mine --rule fire+repetition-guard", "two together"),
        ("fire weigh runs/mine --rule 'weight = 1 + teacher_entropy'", "your own"),
    ),
    "train": (
        ("fire train runs/mine", "what fire.yaml names"),
        ("fire train runs/mine --set train.weights=p30", "by another rule"),
        ("fire train runs/mine --launch 2 --redo", "anew, on two GPUs"),
        ("fire train runs/theirs --from hf://datasets/user/name", "shared scores"),
    ),
    "verify": (
        ("fire verify runs/mine", "a reward for every answer"),
        ("fire verify runs/mine --kind math", "equal as mathematics, not as text"),
        ("fire verify runs/mine --round 0 --redo", "graded anew"),
    ),
    "run": (
        ("fire run runs/mine --rounds 10", "10 in all; again after a kill"),
        ("fire run runs/mine --tracker trackio", "one round, with curves"),
        ("fire run runs/mine --rounds 10 --json", "the table for machines"),
    ),
    "eval": (
        ("fire eval runs/mine", "the last student on held-out prompts"),
        ("fire eval runs/mine --start", "the student before training"),
        ("fire eval runs/mine --against start", "the last one against it, in pairs"),
        ("fire eval runs/mine --prompts aime.jsonl --set eval.n=8", ""),
    ),
    "plan": (
        ("fire plan runs/mine", "what is left, and its cost"),
        ("fire plan runs/mine --rounds 10 --length 600", "10 rounds in all"),
        ("fire plan runs/mine --tokens-per-s rollout=2500", "given, not measured"),
    ),
    "status": (
        ("fire status runs/mine", "what is done, and what is next"),
        ("fire status runs/mine --watch", "live, until the round is trained"),
        ("fire status runs/mine --watch --rounds 10", "until 10 rounds are"),
    ),
    "check": (
        ("fire check runs/mine", "exit 3 and the fix if a file differs"),
        ("fire check runs/mine --json", ""),
    ),
    "inspect": (
        ("fire inspect runs/mine", "the first trajectory of the last round"),
        ("fire inspect runs/mine 3 --round 0", "its row, or the start of its id"),
        ("fire inspect runs/mine 3 --name p30", "under other weights"),
        ("fire inspect runs/mine --schema", "every column with its unit"),
    ),
    "explain": (
        ("fire explain runs/mine 3", "kept or dropped, and why"),
        ("fire explain runs/mine 3 12", "all factors of a coefficient"),
        ("fire explain runs/mine 3 max --json", "the token that counts most"),
    ),
    "diagnose": (
        ("fire diagnose runs/mine", "does the rule's premise hold here?"),
        ("fire diagnose runs/mine --round 0 --name p30 --json", ""),
    ),
    "compare": (
        ("fire compare runs/mine", "fire beside its controls"),
        ("fire compare runs/mine --rules uniform,fire,tip --plot rules.svg", ""),
    ),
    "report": (
        ("fire report runs/mine", "one page, no network needed"),
        ("fire report runs/mine --round 0 --against p30", "other weights beside it"),
    ),
    "rules": (
        ("fire rules", "all of them"),
        ("fire rules fire-paper", "formula, parameters and source of one"),
        ("fire rules fire+repetition-guard", "or of several together"),
    ),
    "track": (
        ("fire track runs/mine --to tensorboard", "all its curves, afterwards"),
        ("fire track runs/mine --to wandb", "offline; `wandb sync` sends it"),
    ),
    "push": (
        ("fire push runs/mine user/name", "private, unless --public"),
        ("fire push runs/mine user/name --round 0", "one round of it"),
        ("fire push runs/mine user/name --flat", "and one joined table"),
    ),
    "pull": (
        ("fire pull user/name runs/theirs", "checked, byte by byte"),
        ("fire pull user/name runs/theirs --round 0", ""),
    ),
    "experiment": (
        ("fire experiment experiments/main.yaml --jobs 2", "again: it goes on"),
        ("fire experiment main.yaml --only 'chain/single/*/seed-000'", "a part of it"),
        ("fire experiment main.yaml --json", ""),
    ),
    "env": (
        ("fire env", ""),
        ("fire env --json", ""),
    ),
    "demo": (
        ("fire demo runs/demo", "a minute or two on a CPU"),
        ("fire demo runs/demo --rule tip --rounds 3", "another rule beside uniform"),
    ),
}  # fmt: skip


def epilog(command: str) -> str:
    """The examples of a command, or of all of them ("") as the help page shows them, the reasons in one column."""
    examples = EXAMPLES[command]
    column = max((len(line) for line, why in examples if why), default=0)
    lines = (f"{line:<{column}}  # {why}" if why else line for line, why in examples)
    return "\n".join(["Examples:", *lines])
