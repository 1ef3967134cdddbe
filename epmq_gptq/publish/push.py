"""Push a checkpoint to a hub: every check first, shard by shard, and shown by one commit.

The weights are uploaded one file at a time, in a way that does not show them; a file or a piece of
one that the hub has is not sent twice, so a push that broke off goes on where it was. One commit at
the end makes all of it visible, so a repository never shows half a checkpoint. Nothing is written
into the folder. (``upload_folder`` commits in batches, and its forerunner ``upload_large_folder``,
which knew neither revisions nor pull requests, kept its state inside the uploaded folder.)
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import EPMQError, EPMQInputError, EPMQWarning
from ..io.console import Reporter, StepProgress
from ..io.declared import bad_option
from ..io.folders import CARD_NAME, read_json, reason_of
from ..io.hub import COMMIT
from .card import check_repo_id
from .upload_plan import UploadFile, UploadPlan, plan_upload

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_PULL_REQUEST = re.compile(r"refs/pr/\d+")
# Git's rules for the name of a branch, as far as people come near them.
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$))[A-Za-z0-9][\w./-]{0,98}[\w-]|[A-Za-z0-9]", re.A)
# Weights that an engine would find beside, or in place of, the ones that are pushed.
_WEIGHTS = re.compile(r"[^/]*\.(safetensors|bin)|[^/]*\.(safetensors|bin)\.index\.json")
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}\b")
_MESSAGE = "Upload E-PMQ checkpoint"


@dataclass
class Pushed:
    """What a push did; of a dry run, what it would do.

    Attributes:
        repo_id: as the hub knows it.
        revision: the branch that was pushed to, or that a pull request is for.
        url: of the commit, or of the pull request; None for a dry run.
        commit: its id; None for a dry run.
        files: name → bytes.
        bytes: of all files, those included that the hub had.
        left: names in the folder that were not uploaded.
        removed: weights of an earlier model that the commit took out.
        created: what was made on the way: "repository", "branch".
        unchanged: the hub had all of it, and there is no new commit.
    """

    repo_id: str
    revision: str
    url: str | None = None
    commit: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    left: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    unchanged: bool = False

    def __str__(self) -> str:
        return self.url or f"{self.repo_id} (dry run)"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return dict(self.__dict__)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    with_report: bool = False,
    with_code: bool = False,
    commit_message: str | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Pushed:
    """Upload a GPTQ checkpoint to a model repository of a hub.

    Args:
        folder: of the checkpoint; nothing is written there, and it may be read-only.
        repo_id: ``org/name``, or ``name`` for one of your own. Made if there is none.
        private: make it private. One that exists keeps what it is; that it is public where
            ``private`` is asked for is an error.
        revision: a branch, made if there is none, or ``refs/pr/N``; default: ``main``.
        create_pr: open a pull request against the branch, which takes no right to write.
        token: default: the one of ``hf auth login`` or ``HF_TOKEN``.
        with_report: also ``epmq_report.json``, ``epmq_report.html``, ``epmq_evaluation.json``.
        with_code: also the code that the model brings (``auto_map``), which is refused otherwise.
        commit_message: its first line.
        dry_run: check, and say what would go; no request is made.
        reporter: where progress goes; default: nowhere.

    Returns:
        Its ``url`` is that of the commit or of the pull request.

    Raises:
        EPMQInputError: the checkpoint is not fit, there is no token or not the right one, or the
            repository or revision cannot be used so.
        EPMQNumericalError: a value of the checkpoint is not finite.
        EPMQError: the connection broke; the same call goes on where it was.
    """
    check_repo_id(repo_id)
    _check_revision(revision)
    plan = plan_upload(folder, with_report=with_report, with_code=with_code)
    for note in plan.notes:
        warnings.warn(EPMQWarning(note, code="EPMQ-P01"), stacklevel=2)
    pushed = Pushed(
        repo_id,
        revision or "main",
        files={file.name: file.size for file in plan.files},
        bytes=plan.bytes,
        left=plan.left,
    )
    if dry_run:
        return pushed
    from huggingface_hub import HfApi, ModelCard

    token = token or _token()
    api = HfApi(token=token, library_name="epmq_gptq")
    with _explained(pushed, token):
        if CARD_NAME in pushed.files:
            # By the hub's own rules, before anything is made or sent.
            ModelCard.load(plan.folder / CARD_NAME).validate()
        head, names = _prepare(api, pushed, private, create_pr)
        operations = _upload(api, pushed, plan, create_pr, reporter)
        _commit(api, pushed, operations, names, head, create_pr, commit_message)
    return pushed


def _check_revision(revision: str | None) -> None:
    if revision is None or _PULL_REQUEST.fullmatch(revision):
        return
    if COMMIT.fullmatch(revision) or _BRANCH.fullmatch(revision) is None:
        raise bad_option(
            "revision",
            "a branch (a commit cannot be pushed to) or `refs/pr/N`",
            revision,
            code="EPMQ-P03",
        )


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise _refused(
            "there is no access token for the hub on this machine",
            "Make one with the right to write on the hub's page Settings, Access Tokens; "
            "then `hf auth login`, or set `HF_TOKEN`.",
            "EPMQ-P02",
            "the hub's token",
        )
    return token


# ---- repository --------------------------------------------------------------------------------


def _refused(
    cause: str, remedy: str, code: str = "EPMQ-P03", subject: str = "`repo_id`"
) -> EPMQInputError:
    return EPMQInputError(f"{cause}.", code=code, subject=subject, remedy=remedy)


def _prepare(
    api: HfApi, pushed: Pushed, private: bool | None, create_pr: bool
) -> tuple[str, list[str]]:
    """Have the repository and the branch. Returns the branch's commit and its files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if "/" not in pushed.repo_id:
        # Asked for by its name alone it could be one of the oldest models, which have no owner.
        pushed.repo_id = f"{api.whoami()['name']}/{pushed.repo_id}"
    try:
        info = api.repo_info(pushed.repo_id)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise _refused(
                f"`{pushed.repo_id}` is not there, or not for you to see, so nothing can be "
                "proposed to it",
                "Correct the name, or leave `create_pr` out to make the repository.",
            ) from error
        api.create_repo(pushed.repo_id, private=private, exist_ok=True)
        pushed.created.append("repository")
        info = api.repo_info(pushed.repo_id)
    if private and info.private is False:
        raise _refused(
            f"`{pushed.repo_id}` is public, and `private` was asked for",
            "Make it private in its settings on the hub, or choose another name.",
        )
    pushed.repo_id = info.id
    _branch(api, pushed, create_pr)
    info = api.repo_info(pushed.repo_id, revision=pushed.revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    is_dense = "config.json" in names and "quantize_config.json" not in names
    if pushed.revision == "main" and not create_pr and is_dense:
        raise _refused(
            f"`{pushed.repo_id}` holds a model that is not quantized, whose weights would be "
            "replaced",
            "Push to another repository, to a branch of it (`revision`), or as a pull request "
            "(`create_pr`).",
        )
    return info.sha, names


def _branch(api: HfApi, pushed: Pushed, create_pr: bool) -> None:
    branch = pushed.revision
    if branch == "main" or _PULL_REQUEST.fullmatch(branch):
        return
    refs = api.list_repo_refs(pushed.repo_id)
    if branch in {each.name for each in refs.branches}:
        return
    if branch in {each.name for each in refs.tags}:
        raise _refused(
            f"`{branch}` is a tag of `{pushed.repo_id}`, which stays where it is",
            "Give a branch.",
            subject="`revision`",
        )
    if create_pr:
        raise _refused(
            f"`{pushed.repo_id}` has no branch `{branch}` to propose something to",
            "Correct it, or leave `create_pr` out to make the branch.",
            subject="`revision`",
        )
    api.create_branch(pushed.repo_id, branch=branch, exist_ok=True)
    pushed.created.append("branch")


# ---- upload ------------------------------------------------------------------------------------


def _upload(
    api: HfApi, pushed: Pushed, plan: UploadPlan, create_pr: bool, reporter: Reporter | None
) -> list[CommitOperationAdd]:
    """Upload what is large, without showing it; what is small travels with the commit."""
    from huggingface_hub import CommitOperationAdd

    adds = {file: CommitOperationAdd(file.name, str(file.path)) for file in plan.files}
    shards = [file for file in plan.files if file.name.endswith(".safetensors")]
    small = [file for file in plan.files if file not in shards]
    options = {
        "revision": pushed.revision,
        "create_pr": create_pr,
        "free_memory": False,
        # Rules of a `.gitignore` in the repository would leave files out without a word.
        "gitignore_content": "",
    }
    with _progress(reporter, plan) as progress:
        for batch in (small, *([shard] for shard in shards)):
            additions = [adds[file] for file in batch]
            api.preupload_lfs_files(pushed.repo_id, additions, **options)
            progress(batch)
    return list(adds.values())


@contextmanager
def _progress(reporter: Reporter | None, plan: UploadPlan) -> Iterator[Any]:
    if reporter is None:
        yield lambda batch: None
        return
    megabyte = 1e6
    total, done = max(1, round(plan.bytes / megabyte)), 0
    with StepProgress(reporter, "upload", total, "MB") as bar:

        def advance(batch: list[UploadFile]) -> None:
            nonlocal done
            before = round(done / megabyte)
            done += sum(file.size for file in batch)
            now = total if done == plan.bytes else round(done / megabyte)
            bar.advance(now - before, batch[-1].name)

        yield advance


def _commit(
    api: HfApi,
    pushed: Pushed,
    adds: list[CommitOperationAdd],
    names: list[str],
    head: str,
    create_pr: bool,
    message: str | None,
) -> None:
    from huggingface_hub import CommitOperationDelete

    stale = [n for n in names if _WEIGHTS.fullmatch(n) and n not in pushed.files]
    removals = [CommitOperationDelete(name, is_folder=False) for name in stale]
    done = api.create_commit(
        pushed.repo_id,
        [*adds, *removals],
        commit_message=message or _MESSAGE,
        revision=pushed.revision,
        create_pr=create_pr,
        # Who commits meanwhile is not overwritten, and `stale` is what is really there.
        parent_commit=head,
    )
    pushed.removed, pushed.commit = stale, done.oid
    pushed.unchanged = done.oid == head
    pushed.url = done.pr_url or done.commit_url


# ---- errors ------------------------------------------------------------------------------------


@contextmanager
def _explained(pushed: Pushed, token: str) -> Iterator[None]:
    """Whatever the library raises, as one of our errors; without the token, whatever it says."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except EPMQError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        # An upload in a thread comes wrapped.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, OfflineModeIsEnabled):
            raise _refused(
                "the hub cannot be reached: `HF_HUB_OFFLINE` is set",
                "Unset it, or look at what would be pushed with `--dry-run`.",
                subject="`HF_HUB_OFFLINE`",
            ) from None
        # No chain: the messages and requests of the library carry headers.
        raise _explanation(cause, pushed, token) from None


class _Answer(NamedTuple):
    """What an answer of the hub means to whoever pushes; ``{name}`` is the repository."""

    cause: str
    remedy: str
    code: str = "EPMQ-P03"
    subject: str = "`repo_id`"


_AGAIN = "and push again; what was uploaded is not sent twice."
_CHANGED = _Answer(
    "{name} was changed by somebody else meanwhile", f"Look at what they did, {_AGAIN}"
)
# Status → what it means; all others mean that the connection broke.
_ANSWERS = {
    400: _Answer(
        "the hub refuses the files for {name}",
        f"Correct what it names {_AGAIN}",
        "EPMQ-P01",
        "the checkpoint",
    ),
    401: _Answer(
        "the hub does not accept the access token for {name}",
        "Make a new one with the right to write; then `hf auth login`, or set `HF_TOKEN`.",
        "EPMQ-P02",
        "the hub's token",
    ),
    403: _Answer(
        "the access token may not write to {name}",
        "Take a token with the right to write there, a repository of your own, or "
        "`create_pr`, which takes no such right.",
        "EPMQ-P02",
        "the hub's token",
    ),
    404: _Answer(
        "{name} or its revision `{revision}` is not there",
        "Correct the name; a pull request (`refs/pr/N`) must be open.",
    ),
    409: _CHANGED,
    412: _CHANGED,
}


def _explanation(error: Exception, pushed: Pushed, token: str) -> EPMQError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and isinstance(error, ValueError):
        status = 400  # the library's own checks
    name, said = f"`{pushed.repo_id}`", _said(error, token)
    answer = _ANSWERS.get(status)
    if answer is None:
        return EPMQError(
            f"the upload to {name} did not come to its end: {said}.",
            code="EPMQ-P04",
            subject=name,
            remedy="Nothing of it shows in the repository. Push again: what was uploaded is not "
            "sent twice.",
        )
    cause = answer.cause.format(name=name, revision=pushed.revision)
    return _refused(f"{cause}: {said}", answer.remedy, answer.code, answer.subject)


def _said(error: Exception, token: str) -> str:
    text = getattr(error, "server_message", None) or reason_of(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return _SECRET.sub("…", line.replace(token, "…")).rstrip(".:")[:300]


# ---- models in memory --------------------------------------------------------------------------


def push_model(model: Any, repo_id: str, **options: Any) -> Pushed:
    """``model.push_to_hub`` of a model that was quantized with an ``EPMQConfig``.

    What ``save`` wrote is pushed, if it is still there and still this model; else the model is
    saved to a temporary folder first.

    Args:
        model: the host's.
        repo_id: see :func:`push`.
        options: of :func:`push`.

    Raises:
        EPMQInputError: as :func:`push`, or ``quantize`` was not called.
    """
    if not getattr(model, "quantized", False) or getattr(model, "epmq_report", None) is None:
        raise EPMQInputError(
            "`push_to_hub` came before `quantize`: there is nothing quantized to push yet.",
            code="EPMQ-F52",
            subject="`push_to_hub`",
            remedy="Call `quantize` first.",
        )
    saved = getattr(model, "epmq_saved", None)
    if saved is not None and _is_of(model, saved):
        return push(saved, repo_id, **options)
    with tempfile.TemporaryDirectory(prefix="epmq-push-") as folder:
        model.save(str(Path(folder) / "checkpoint"))
        return push(Path(folder) / "checkpoint", repo_id, **options)


def _is_of(model: Any, folder: Path) -> bool:
    """Whether a folder holds what this model's run made."""
    try:
        meta = read_json(folder, "quantize_config.json", "the checkpoint").get("meta", {})
    except EPMQInputError:
        return False
    made = json.loads(json.dumps(model.epmq_report.provenance))
    return isinstance(meta, dict) and meta.get("epmq") == made
