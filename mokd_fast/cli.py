"""mokd-fast: pretrain, knn, linear, export, views, report, bench, doctor, demo."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from .console import RunConsole
from .errors import UserError

app = typer.Typer(
    help="Two different vision models, pre-trained together without labels (MOKD).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = RunConsole()

RunArgument = Annotated[Path, typer.Argument(help="a run folder, or a checkpoint of one")]
Student = Annotated[bool, typer.Option("--student", help="the student, not its EMA teacher")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value on top of the recipe", metavar="[KEY=VALUE]..."),
]


@app.command()
def pretrain(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="run folder (default: runs/<recipe>)")] = None,
    warm_start: Annotated[
        Path | None,
        typer.Option(help="a run folder or checkpoint whose weights a new run starts from"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="a few steps, then time and memory of the whole run")
    ] = False,
) -> None:
    """Pre-train the models of RECIPE: a published name or a .yaml file.

    A run that was cut off goes on from its last checkpoint. Ctrl-C and SIGTERM end the step and
    write one; exit codes 130 and 143.

    mokd-fast pretrain data.root=pictures pair=resnet50+vit_small
    """
    words = arguments or []
    named = words[:1] if words and "=" not in words[0] else []
    recipe = named[0] if named else "resnet50-vit_small"
    if dry_run:
        from .train.dry import dry_run as measure
        from .train.recipe import load_recipe

        measure(load_recipe(recipe, words[len(named) :]), console)
        return
    folder = _train(recipe, *words[len(named) :], run=run, warm_start=warm_start)
    _say(f"Run folder: {folder}")


@app.command()
def knn(run: RunArgument, overrides: Overrides = None, student: Student = False) -> None:
    """Weighted kNN of the backbones, beside random initialisation and raw pixels."""
    _evaluate("knn", run, overrides or [], student)


@app.command()
def linear(run: RunArgument, overrides: Overrides = None, student: Student = False) -> None:
    """Linear probe and kNN of the frozen backbones, with the same controls."""
    _evaluate("linear", run, overrides or [], student)


@app.command()
def export(
    run: RunArgument,
    model: Annotated[int, typer.Option(help="number of the model, from 1")] = 1,
    student: Student = False,
    out: Annotated[Path | None, typer.Option(help="file (default: in the run folder)")] = None,
) -> None:
    """Write a backbone as safetensors that timm loads strictly."""
    from . import api

    which: api.Which = "student" if student else "teacher"
    _say(str(api.export(run, model=model, which=which, path=out)))


@app.command()
def views(
    folder: Annotated[str, typer.Argument(help="pictures: whatever data.root takes")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="whose augmentation")] = "resnet50-vit_small",
    images: Annotated[int, typer.Option(min=1, help="how many pictures")] = 4,
    loader: Annotated[
        list[str] | None,
        typer.Option(help="pillow, cpu or dali, maybe several (default: pillow and cpu)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="the PNG")] = Path("views.png"),
) -> None:
    """Draw every view of a few pictures with its numbers, as one PNG.

    mokd-fast views pictures augment.locals=4 --loader pillow --loader dali
    """
    from . import api

    _say(str(api.views(folder, *(overrides or []), recipe=recipe, images=images,
                       loaders=loader or ("pillow", "cpu"), out=out)))  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, side by side on one page")],
    out: Annotated[Path | None, typer.Option(help="file (default: report.html in RUN)")] = None,
) -> None:
    """Write one self-contained HTML page: what a run did, and what it learned."""
    from . import api

    with console.status("making the report"):
        page = api.report(*runs, out=out)
    _say(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="distill, linear_distill, search, augment, data, step (default: all)"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few shapes and rounds")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="step: ResNet-50 + ViT-S too, which needs 20 GB")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder (default: bench/results of the checkout, else bench-results)"),
    ] = None,
) -> None:
    """Measure the operators and the step against the forms in use elsewhere.

    Each is timed beside the others in one process, turn by turn, and writes OUT/MACHINE/NAME.json.
    CUDA_VISIBLE_DEVICES= measures the CPU of a machine with a GPU.

    mokd-fast bench distill step --quick
    """
    from . import benchmarks

    try:
        failed = benchmarks.run(names or [], console, quick=quick, full=full, out=out)
    except KeyboardInterrupt:  # the benchmark that ran has ended by the same signal
        raise SystemExit(130) from None
    if failed:
        raise SystemExit(1)


@app.command()
def doctor() -> None:
    """Say what is installed, which backends run here and why the others do not."""
    from . import doctor as facts

    console.print(facts.environment())
    for op, lines in facts.backends().items():
        console.print(f"\n[bold]{op}[/bold]")
        _say(lines)


@app.command()
def demo(
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
) -> None:
    """Minutes on a CPU: real pictures, MOKD pre-training of a small CNN + ViT, evaluation."""
    from . import api
    from .data.builtin import fashion_mnist_or_digits

    name, folder = fashion_mnist_or_digits()
    _say(f"Pictures: {name} in {folder}")
    if name != "fashion-mnist":
        _say("Fashion-MNIST is out of reach here, so scikit-learn's digits stand in.")
    roots = [
        f"data.root={folder}/train",
        f"evaluate.train={folder}/train",
        f"evaluate.test={folder}/test",
    ]
    _train("fashion-mnist", *roots, *(overrides or []), run=run)
    result = _evaluate("linear", run, [], student=False)
    files = [api.export(run, model=i) for i in (1, 2)]
    for i, kind in ((1, "CNN"), (2, "ViT")):
        trained, random = (
            next(row for key, row in result.items() if key.startswith(str(i)) and key.endswith(end))
            for end in ("teacher", "random")
        )
        k = next(iter(trained["knn"]))
        _say(
            f"The {kind} learned without a label: kNN {random['knn'][k]:.1f} -> "
            f"{trained['knn'][k]:.1f} %, on shifted pictures {random['knn_shifted'][k]:.1f} -> "
            f"{trained['knn_shifted'][k]:.1f} % (random initialisation -> trained)."
        )
    _say(f"The run lies in {run}, the backbones in:")
    for file in files:
        _say(f"  {file}")
    try:
        _say(f"What it did and learned, for the browser: {api.report(run)}")
    except UserError as error:  # without the extra: the run stands all the same
        _say(f"No report: {error}")


def _train(recipe: str, *overrides: str, **options: Path | None) -> Path:
    from .train.loop import pretrain

    try:
        return pretrain(recipe, *overrides, console=console, **options)
    except KeyboardInterrupt:  # it has said what is kept
        raise SystemExit(130) from None


def _say(text: str) -> None:
    """A line as it is: brackets of a path are no markup, and it is not broken at 80 columns."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _evaluate(kind: str, run: Path, overrides: list[str], student: bool) -> dict[str, dict]:
    from . import api
    from .evaluate import format_table

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, object] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                if not console.is_terminal:
                    console.print(f"evaluating: {stage}", highlight=False)
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        which: api.Which = "student" if student else "teacher"
        command = api.linear if kind == "linear" else api.knn
        result = command(run, *overrides, which=which, progress=show)
    console.print(format_table(result))
    return result


def main() -> None:
    """The console script. What the user can mend is one message and exit code 2, no traceback."""
    # Of several processes (train/distributed.py) the first one speaks.
    console.quiet = (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0"
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(arguments)
    except UserError as error:
        if debug:
            raise
        Console(stderr=True).print(
            f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
