"""Command line of publishing: `hub stage | try | changes | plan | publish | propose | verify | serve`.

Reads release folders, and the Hub's address and token from huggingface_hub's own settings (`HF_ENDPOINT`,
`HF_TOKEN`, `hf auth login`); a token is never an argument and never printed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cards.facts import is_hub_id, repo_id
from daco.errors import DacoError, RecipeError
from daco.manifest import MANIFEST, read_manifest
from hub import publish as publishing
from hub.changes import changes as find_changes
from hub.changes import supersede, write_changelog, yank
from hub.local.server import serve as serve_hub
from hub.plan import Access
from hub.propose import propose as propose_release
from hub.quick_start import record
from hub.remote import Target
from hub.stage import stage as stage_folder
from hub.verify import verify as verify_release

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Folder = Annotated[
    Path,
    typer.Argument(help="Release folder, for instance RUN/release/dataset.", exists=True, file_okay=False),
]
Repo = Annotated[str | None, typer.Option(help="org/name; the manifest's when left out.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of the Hub; HF_ENDPOINT's when left out.")]
Since = Annotated[
    str | None,
    typer.Option(help="Older release (its folder, or org/name@vX.Y.Z): write CHANGELOG.md of the changes."),
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public", help="Visibility of a repo that is made; --private refuses a public one."
    ),
]
Gated = Annotated[
    str, typer.Option(help="auto or manual: readers must ask first. Set before anything is sent.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def serve(
    root: Annotated[Path, typer.Option(help="Folder that holds the Hub; made if missing.")],
    host: Annotated[str, typer.Option(help="Address to listen on; its tokens are no secrets.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
) -> None:
    """Serve a local Hub until interrupted; its tokens are hf_local (write) and hf_local_reader (read)."""
    try:
        serve_hub(root, host, port)
    except OSError as error:  # the port or the folder is taken
        raise typer.Exit(_fail(error)) from None


@app.command()
def stage(
    folder: Folder,
    since: Since = None,
    superseded_by: Annotated[str, typer.Option(help="org/name of the repo that newer releases are in.")] = "",
    withdrawn: Annotated[
        list[str], typer.Option("--yank", help="VERSION=REASON: an older version that nobody should use.")
    ] = [],  # noqa: B006  typer makes a new one
) -> None:
    """Render the card of a release folder and list it in the manifest; with --since its changelog too."""
    for one in withdrawn:
        version, _, reason = one.partition("=")
        yank(folder, version.removeprefix("v"), reason)
    if superseded_by:
        supersede(folder, _checked(superseded_by, "--superseded-by"))
    if since is not None:
        print(write_changelog(folder, since))
    stage_folder(folder)
    print(folder / "README.md")


@app.command("try")
def try_quick_start(
    folder: Folder,
    others: Annotated[
        list[Path], typer.Option("--with", help="Release folders that the code loads too.")
    ] = [],  # noqa: B006
    base: Annotated[Path | None, typer.Option(help="Folder of the base model that the code loads.")] = None,
) -> None:
    """Run the card's quick start as printed, on a Hub of its own, and put its output into the card."""
    for output in record(folder, others, base):
        print(output, end="")
    print(folder / "README.md")


@app.command()
def changes(
    folder: Folder,
    since: Annotated[str, typer.Option(help="Older release: its folder, or org/name@vX.Y.Z.")],
    as_json: Json = False,
) -> None:
    """Show what changed since an older release, and how large a step in version that asks for."""
    found = find_changes(since, folder)
    print(_json(found.to_json()) if as_json else found)


@app.command()
def plan(
    folder: Folder,
    repo: Repo = None,
    endpoint: Endpoint = None,
    private: Private = None,
    gated: Gated = "",
    as_json: Json = False,
) -> None:
    """Show what publishing would send, delete or refuse; exit code 1 when it would refuse."""
    found = publishing.plan(folder, _target(folder, repo, endpoint), _access(private, gated))
    print(_json(found.to_json()) if as_json else found)
    if found.refusals:
        raise typer.Exit(1)


@app.command()
def publish(
    folder: Folder,
    repo: Repo = None,
    endpoint: Endpoint = None,
    private: Private = None,
    gated: Gated = "",
    as_json: Json = False,
) -> None:
    """Publish a release folder as one commit and one tag, and read it back; run again to resume."""
    done = publishing.publish(folder, _target(folder, repo, endpoint), _access(private, gated))
    what = (
        f"sent {done.bytes_sent:,} B" if done.committed else "nothing to do: the tag holds this very content"
    )
    print(
        _json(asdict(done))
        if as_json
        else f"{done.repo_type} {done.repo_id} {done.tag} is commit {done.commit}\n{what}\n{done.url}"
    )


@app.command()
def propose(folder: Folder, repo: Repo = None, endpoint: Endpoint = None, as_json: Json = False) -> None:
    """Propose a release to a repo of others as one pull request, and read it back; run again to resume.

    Its maintainers merge it and run `publish` on the same folder, which then only tags.
    """
    done = propose_release(folder, _target(folder, repo, endpoint))
    what = f"sent {done.bytes_sent:,} B" if done.committed else "nothing to do: it was open already"
    where = f"{done.repo_type} {done.repo_id} {done.tag} is proposed in {done.revision}"
    print(_json(asdict(done)) if as_json else f"{where}, commit {done.commit}\n{what}\n{done.url}")


@app.command()
def verify(
    release: Annotated[str, typer.Argument(help="Release folder, or org/name of a repo.")],
    repo: Repo = None,
    kind: Annotated[
        str, typer.Option("--type", help="dataset or model, of a repo given by name.")
    ] = "dataset",
    tag: Annotated[str | None, typer.Option(help="Tag; the folder's own version, or main of a repo.")] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Compare every byte that the Hub serves at a tag with the release's manifest."""
    folder, expected = Path(release), None
    if folder.is_dir():
        target, tag = _target(folder, repo, endpoint), tag or f"v{read_manifest(folder)['version']}"
        expected = (folder / MANIFEST).read_bytes()
    else:
        target, tag = Target(_checked(release, release), _kind(kind), endpoint), tag or "main"
    commit = verify_release(target, tag, expected)
    facts = {"repo_id": target.repo_id, "repo_type": target.repo_type, "tag": tag, "commit": commit}
    print(
        _json(facts) if as_json else f"{target} {tag} is commit {commit}; every file is as its manifest says"
    )


def _target(folder: Path, repo: str | None, endpoint: str | None) -> Target:
    manifest = read_manifest(folder)
    return Target(_checked(repo or repo_id(manifest), str(folder)), manifest["kind"], endpoint)


def _checked(repo: str, where: str) -> str:
    if not is_hub_id(repo):
        raise RecipeError(
            f"{where}: expected a repo `org/name`, got {repo!r}; set release.org or give --repo"
        )
    return repo


def _access(private: bool | None, gated: str) -> Access:
    if gated not in ("", "auto", "manual"):
        raise typer.BadParameter(f"expected auto or manual, got {gated!r}", param_hint="--gated")
    return Access(private, gated)


def _kind(text: str) -> str:
    if text not in ("dataset", "model"):
        raise typer.BadParameter(f"expected dataset or model, got {text!r}", param_hint="--type")
    return text


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2, sort_keys=True)


def _fail(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


def main() -> int:
    """Run the command line; our own errors end it with one line and exit code 1."""
    try:
        app()
    except DacoError as error:
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
