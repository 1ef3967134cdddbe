"""FusionBench's corner of the hub on localhost: mini CLIPs, mini T5s and mini datasets.

Every id, file name, tensor name, column and split is that of the real hub; only the sizes are not.
Labels are what the expert of a task answers, so that experts score 100 and other models less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import numpy as np
import torch
from hub import Hub, Repository, _etag, _files, _Handler, commit_of
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CLIP = "openai/clip-vit-base-patch32"
T5 = "google/flan-t5-base"
IMAGE = 32
ANSWERS = ("unacceptable", "acceptable")


class FusionHub(Hub):
    """The double of models, and of datasets under ``/datasets/``."""

    def __init__(self) -> None:
        super().__init__()
        self.datasets: dict[str, Repository] = {}

    def add_dataset(self, name: str, folder: Path) -> str:
        """Publish a folder as the newest commit of a dataset."""
        repository = self.datasets.setdefault(name, Repository())
        commit = commit_of(f"dataset {name} {len(repository.commits)}")
        repository.commits[commit] = folder
        repository.branches["main"] = commit
        return commit

    def answer(self, request: _Handler) -> None:
        """Answer one request; those for models as the parent does."""
        if request.command == "POST":
            length = int(request.headers.get("Content-Length") or 0)
            request.posted = request.rfile.read(length)
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self._datasets_api(request, "/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            found = self._dataset(request, "/".join(parts[1:3]), parts[4])
            if found is not None:
                self._dataset_file(request, *found, "/".join(parts[5:]))
        else:
            super().answer(request)

    def _dataset(self, request: _Handler, name: str, revision: str):
        repository = self.datasets.get(name)
        if repository is None:
            request.refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        commit = repository.find(revision)
        if commit is None:
            request.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository.commits[commit], commit

    def _datasets_api(self, request: _Handler, name: str, rest: Sequence[str]) -> None:
        kind = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        found = self._dataset(request, name, revision)
        if found is None:
            return
        folder, commit = found
        files = _files(folder)
        if kind == "tree":
            deep = "true" in parse_qs(urlsplit(request.path).query.lower()).get("recursive", [])
            entries = _entries(files, "/".join(rest[2:]), deep)
            request.reply_json(entries)
        elif kind == "paths-info":
            asked = parse_qs(request.posted.decode()).get("paths")
            asked = asked or json.loads(request.posted or b"{}").get("paths", [])
            request.reply_json([e for e in _entries(files, "", True) if e["path"] in asked])
        elif kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": commit, "private": False, "gated": False, "tags": []}
            request.reply_json(facts | {"disabled": False, "siblings": siblings})
        else:
            request.reply(404, b"not found")

    def _dataset_file(self, request: _Handler, folder: Path, commit: str, path: str) -> None:
        file = _files(folder).get(path)
        if file is None:
            request.refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        request.reply(200, file.read_bytes(), headers)


def _do_post(self: _Handler) -> None:
    self.answer()


_Handler.do_POST = _do_post  # the hub is asked for paths by POST; models never are


def _entries(files: dict[str, Path], under: str, deep: bool) -> list[dict]:
    found, folders = [], set()
    for path, file in files.items():
        if under and not path.startswith(f"{under}/"):
            continue
        tail = path[len(under) + 1 :] if under else path
        head = tail.split("/")[0]
        if "/" in tail:
            folders.add(f"{under}/{head}" if under else head)
            if not deep:
                continue
        size = file.stat().st_size
        found.append({"type": "file", "path": path, "size": size, "oid": _etag(file)})
    return found + [
        {"type": "directory", "path": path, "oid": commit_of(path)} for path in sorted(folders)
    ]


# ---- CLIP --------------------------------------------------------------------------------------


def clip_folder(folder: Path) -> CLIPModel:
    """A base CLIP with tokenizer and image processor, as the hub's repository holds it."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=tower
        | {
            "num_hidden_layers": 1,
            "vocab_size": 514,
            "max_position_embeddings": 160,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        vision_config=tower | {"num_hidden_layers": 2, "image_size": IMAGE, "patch_size": 16},
        projection_dim=64,
    )
    clip = CLIPModel(config).eval()
    _spread(clip.state_dict(), 3.0)
    clip.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": IMAGE, "width": IMAGE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(folder)
    return clip


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own class: a token per byte, and one per byte that ends a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])


@torch.no_grad()
def _spread(state: dict[str, torch.Tensor], factor: float) -> None:
    """Untrained weights answer nearly the same to everything; larger ones do not."""
    for name, tensor in state.items():
        if tensor.ndim >= 2 and "norm" not in name:
            tensor *= factor


@torch.no_grad()
def clip_expert(clip: CLIPModel, folder: Path, seed: int) -> CLIPVisionModel:
    """A fine-tune of the vision tower, with the tensor names of the hub's."""
    generator = torch.Generator().manual_seed(seed)
    model = CLIPVisionModel(clip.config.vision_config).eval()
    state = {k: v.clone() for k, v in clip.vision_model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim == 2 and "embedding" not in name:
            tensor += 0.4 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    model.load_state_dict(state)
    folder.mkdir(parents=True)
    named = {f"vision_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    config = clip.config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]}
    config |= {"model_type": "clip_vision_model", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Coarse random colours, large and small, some grey or with a palette as on the hub."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((40 + index % 3, 40), Image.Resampling.NEAREST)
        found.append(image.convert("L") if index % 7 == 3 else image)
    return found


def pixel_values(images: Sequence[Image.Image], folder: Path) -> torch.Tensor:
    """``(B, 3, H, W)`` by the processor of a folder."""
    processor = CLIPImageProcessor.from_pretrained(folder)
    return torch.cat(
        [processor(images=i.convert("RGB"), return_tensors="pt")["pixel_values"] for i in images]
    )


def dataset_folder(
    folder: Path, splits: dict[str, dict[str, list]], config: str | None = None
) -> Path:
    """Parquet files of a dataset's splits; a column of pictures becomes the hub's image column."""
    place = folder / config if config else folder / "data"
    place.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        data = datasets.Dataset.from_dict(
            columns,
            features=datasets.Features({n: _feature(values[0]) for n, values in columns.items()}),
        )
        data.to_parquet(place / f"{split}-00000-of-00001.parquet")
    return folder


def _feature(value):
    if isinstance(value, Image.Image):
        return datasets.Image()
    kinds = {bool: "bool", int: "int64", float: "float32", str: "string"}
    return datasets.Value(kinds[type(value)])


def readme(folder: Path, configs: Sequence[str]) -> None:
    """The card that tells the configurations of a dataset."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for file in sorted((folder / config).glob("*.parquet")):
            lines.append(f"  - split: {file.name.partition('-')[0]}")
            lines.append(f"    path: {config}/{file.name}")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


# ---- FLAN-T5 -----------------------------------------------------------------------------------


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word of ``texts``, and ``</s>`` after each text as T5 has it."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: index + 3 for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


@torch.no_grad()
def t5_folder(
    folder: Path, tokenizer: PreTrainedTokenizerFast, groups: Sequence[tuple[Sequence, Sequence]]
):
    """An untrained T5 that answers a prompt with an answer of its group; which, the text decides.

    Direction 0 of the embeddings says "an answer was given": the head turns it into ``</s>``.
    Direction 1 is always on: the head turns it into an answer, and other tokens never win. As
    FLAN-T5's, the head is a matrix of its own.

    Args:
        groups: (answers, prompts), two of them.
    """
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config).eval()
    ids = [[tokenizer.convert_tokens_to_ids(a) for a in answers] for answers, _ in groups]
    given = [token for each in ids for token in each]
    for name, tensor in model.state_dict().items():
        if name.endswith(("Attention.o.weight", "wo.weight")):
            tensor[:2] = 0.0  # no layer touches the two directions
        if name.endswith("EncDecAttention.q.weight"):
            tensor *= 60.0  # attends to few words, so that they decide
        if name.endswith("EncDecAttention.o.weight"):
            tensor *= 4.0
    model.shared.weight[:, :2] = torch.tensor([-20.0, 20.0])
    model.shared.weight[given, 0] = 20.0
    # What the decoder makes of every prompt, `(prompts, d_model)` of each group. Rows of the head
    # look at how it differs within a group, and at which group it is.
    states = [
        torch.stack([_first_state(model, tokenizer, t) for t in texts]) for _, texts in groups
    ]
    means = [each.mean(0) for each in states]
    head = torch.zeros_like(model.shared.weight)
    for tokens, state, mean, other in zip(ids, states, means, means[::-1], strict=True):
        _, _, directions = torch.linalg.svd(state - mean)
        head[tokens] = torch.randn(len(tokens), 4) @ directions[:4]
        constant = head[tokens] @ mean
        apart = mean - other
        head[tokens] += ((10.0 - constant) / (apart @ mean))[:, None] * apart
    head[given, :2] = torch.tensor([-50.0, 50.0])
    head[1, :2] = torch.tensor([50.0, 50.0])
    model.lm_head.weight = torch.nn.Parameter(head)
    _save_t5(model, tokenizer, folder)
    return model


def _first_state(model, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    ids, start = torch.tensor([tokenizer(text)["input_ids"]]), torch.tensor([[0]])
    encoded = model.encoder(input_ids=ids).last_hidden_state
    state = model.decoder(input_ids=start, encoder_hidden_states=encoded).last_hidden_state[0, 0]
    state[:2] = 0.0
    return state


@torch.no_grad()
def t5_expert(model, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int):
    """A fine-tune of it."""
    generator = torch.Generator().manual_seed(seed)
    expert = T5ForConditionalGeneration(model.config).eval()
    expert.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    expert.load_state_dict(model.state_dict())
    for name, tensor in expert.state_dict().items():
        if name.endswith(("v.weight", "k.weight", "wi_0.weight")):
            tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    _save_t5(expert, tokenizer, folder)
    return expert


def _save_t5(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def greedy(model, tokenizer: PreTrainedTokenizerFast, text: str, longest: int = 10) -> str:
    """The greedy answer to one text, without padding and without ``generate``."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    answer = torch.tensor([[0]])
    while answer.shape[1] < longest:
        token = model(input_ids=ids, decoder_input_ids=answer).logits[0, -1].argmax().view(1, 1)
        answer = torch.cat([answer, token], 1)
        if int(token) == 1:
            break
    return tokenizer.decode(answer[0], skip_special_tokens=True)
