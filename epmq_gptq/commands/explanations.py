"""What every error code means, why it comes and what to do: `epmq-gptq explain` and the docs.

The one source of docs/troubleshooting. What a code stands for in a few words is in
:data:`epmq_gptq.errors.CODES`. Examples were printed; tests/commands/test_explanations.py
holds their wording against the places that raise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import CODES, EPMQInputError


@dataclass(frozen=True)
class Explanation:
    """One code.

    Attributes:
        cause: when it usually comes.
        remedy: what to do about it.
        example: a line as it was printed.
        means: what stands behind it, where the few words of ``CODES`` do not say enough.
    """

    cause: str
    remedy: str
    example: str
    means: str = ""


_ENTRIES: dict[str, Explanation] = {
    "EPMQ-F01": Explanation(
        cause="The expert was saved by another tool, or only in part, or it is a fine-tune of "
        "another model; or an upload or a merge was not complete.",
        remedy="Save or fetch the model again. An expert must hold every linear layer that will be "
        "quantized; `dynamic` leaves layers out.",
        example="error: expert `math`: `model.layers.0.self_attn.q_proj.weight` is missing; "
        "`model.layers.1.mlp.up_proj.weight` is missing. An expert must hold every linear layer of "
        "the merged model, fine-tuned from the same base. [EPMQ-F01]",
    ),
    "EPMQ-F02": Explanation(
        means="The run goes on without them.",
        cause="The expert has parts that the merged model has not: a vision tower, a value head, "
        "buffers of its training.",
        remedy="Nothing, if the merged model is meant to be without them. Otherwise look whether "
        "the right model was merged.",
        example="warning: expert `math`: 1 tensor that the merged model does not have: "
        "`vision.weight`. They are ignored. [EPMQ-F02]",
    ),
    "EPMQ-F03": Explanation(
        cause="The expert is another size of the same family, or was pruned or widened.",
        remedy="Give the models that the merge was really made of. `epmq-gptq inspect` lists every "
        "tensor that does not fit.",
        example="error: expert `math`: `model.layers.0.self_attn.q_proj.weight` has shape (16, 32),"
        " the merged model has (32, 32). An expert must hold every linear layer of the merged "
        "model, fine-tuned from the same base. [EPMQ-F03]",
    ),
    "EPMQ-F04": Explanation(
        means="Weights of equal shape compute something else where heads, activation, norms or "
        "positions differ. What changes every output stops the run; small differences, such as the "
        "epsilon of a norm, are a warning.",
        cause="The expert comes from another base, or its `config.json` was edited.",
        remedy="Give experts of the base that the merge was made from. After a warning: go on if "
        "the difference is meant; the merged model's own setting is used.",
        example="error: expert `math`: `num_attention_heads` is 4, the merged model has 2. Give "
        "experts that were fine-tuned from the model that the merge was made of. [EPMQ-F04]",
    ),
    "EPMQ-F05": Explanation(
        means="Only linear layers are quantized, so a longer embedding of an expert does no harm "
        "by itself; its new tokens are unknown to the merge.",
        cause="The expert added tokens (a chat template, padding) before it was fine-tuned.",
        remedy="Give calibration rows as text, or with ids of the merged model's tokenizer.",
        example="warning: expert `math`: `model.embed_tokens.weight` has 264 rows, the merged model"
        " has 260. Embeddings and heads come from the merge; give calibration rows whose tokens "
        "the merged tokenizer knows. [EPMQ-F05]",
    ),
    "EPMQ-F06": Explanation(
        means="Weights are read as F32, F16 or BF16. Mixed ones are read as F32 and noted.",
        cause="The checkpoint was saved in float64, in 8-bit integers or in float8.",
        remedy="Load it with transformers and save it again with `dtype=torch.bfloat16`.",
        example="error: expert `math`: `model.layers.0.self_attn.q_proj.weight` has dtype I8, not "
        "one of F32, F16 and BF16. An expert must hold every linear layer of the merged model, "
        "fine-tuned from the same base. [EPMQ-F06]",
    ),
    "EPMQ-F07": Explanation(
        cause="The folder or hub id is a GPTQ, AWQ, bitsandbytes or FP8 version of the model.",
        remedy="Give the full-precision model; hubs usually name it as the base of the quantized "
        "one.",
        example="error: `merged`: `merged` is already quantized. Give the full-precision model. "
        "[EPMQ-F07]",
    ),
    "EPMQ-F08": Explanation(
        means="A sample of the weights is looked at before the run (a warning), every weight when "
        "its layer comes (an error, exit code 3).",
        cause="The fine-tuning diverged, or the file is damaged in a way that its header hides.",
        remedy="`epmq-gptq inspect --verify full` counts them in every tensor. Fetch the expert "
        "again, take an earlier checkpoint of it, or leave it out; `on_bad_module: rtn` rounds such"
        " a layer to nearest and records it.",
        example="error: expert `math`: tensor `model.layers.0.self_attn.q_proj.weight` holds 1 "
        "non-finite value, the first at index (3, 5). Find where it came from; nothing sensible can"
        " be made of it. [EPMQ-F08]",
    ),
    "EPMQ-F09": Explanation(
        means="No policy lets a run go on with it: rounding to nearest has nothing to round "
        "either.",
        cause="An expert had NaN or infinite weights and they went into the merge, or factors "
        "overflowed half precision.",
        remedy="`epmq-gptq inspect --verify full` says which model they came from. Merge again.",
        example="error: `model.layers.0.self_attn.q_proj`: the merged weight holds 1 non-finite "
        "value, the first at index (3, 5). Merge again, or quantize a merge that is finite. "
        "[EPMQ-F09]",
    ),
    "EPMQ-F10": Explanation(
        means="A checkpoint that names files outside of its folder could make this program read "
        "anything on your machine.",
        cause="A shard's name in the index holds `..` or a folder, or a file is a symbolic link "
        "that leads out of the folder. (The hub's own cache is known and allowed.)",
        remedy="Put the file itself into the folder. Do not use a downloaded checkpoint that does "
        "this unless you know who wrote it.",
        example="error: expert `math`: `model.safetensors` is a link that escapes the checkpoint. "
        "Put the file itself there; links out of the folder are not followed. [EPMQ-F10]",
    ),
    "EPMQ-F11": Explanation(
        cause="A download stopped halfway, or a model was saved into a folder that held shards of "
        "another.",
        remedy="Fetch or save it again into an empty folder.",
        example="error: expert `math`: `model.safetensors.index.json` says tensor `ghost.weight` is"
        " in `model-00001-of-00002.safetensors`, which lacks it. Fetch or save the checkpoint "
        "again, into an empty folder. [EPMQ-F11]",
    ),
    "EPMQ-F12": Explanation(
        cause="A download was cut off, or a disk ran full while the file was written. A file of "
        "about 130 bytes is the pointer of git-lfs, not the weights.",
        remedy="Fetch it again (`git lfs pull`, or `hf download`).",
        example="error: expert `math`: shard `model.safetensors` (71,528 bytes, 143,056 expected) "
        "is damaged: Error while deserializing header: incomplete metadata, file not fully covered."
        " Fetch it again. [EPMQ-F12]",
    ),
    "EPMQ-F13": Explanation(
        cause="A JSON file of the model was edited by hand, or is an error page that was "
        "downloaded.",
        remedy="Restore it from where the model came from.",
        example="error: expert `math`: `config.json` should be a JSON object, got list. Restore the"
        " file from where the model came from. [EPMQ-F13]",
    ),
    "EPMQ-F14": Explanation(
        means="Opening a pickle runs whatever code is in it, so this program never does.",
        cause="The checkpoint has `pytorch_model.bin`, `.pt` or `.gguf` files only.",
        remedy="Convert it where you trust it: "
        "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`. Many repositories have "
        "a converted revision.",
        example="error: expert `math`: no safetensors weights in `math`; it holds "
        "`pytorch_model.bin`, and pickle files are never opened. Convert it where you trust it: "
        "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`. [EPMQ-F14]",
    ),
    "EPMQ-F15": Explanation(
        cause="A typing mistake, or a path relative to another folder: paths in a recipe are "
        "relative to the recipe's file.",
        remedy="Correct the path, or write a hub id as `org/name@revision`.",
        example="error: `merged`: `megred` is neither an existing folder nor a hub id of the form "
        "`org/name@revision`. Correct the path or the id. [EPMQ-F15]",
    ),
    "EPMQ-F16": Explanation(
        means="Without a revision a hub id can mean another model tomorrow. That is a warning, and "
        "with `require_pinned` an error; what is not there, gated or out of reach is an error.",
        cause="An id without `@revision`; a private or gated repository without a token; no "
        "network, and the cache lacks the model.",
        remedy="Write `org/name@` and the 40 digits of the commit (the warning has them). For "
        "private or gated ones `hf auth login` or `HF_TOKEN`. Offline, fetch it before with `hf "
        "download`.",
        example="warning: expert `math`: `org/math` is not pinned; today it is "
        "`org/math@77e9a5d6057aa1c81382df4d8fde3c22425eb73b`. [EPMQ-F16]",
    ),
    "EPMQ-F17": Explanation(
        means="The model would count twice in every sum.",
        cause="A folder was copied, or one path was given under two names.",
        remedy="Leave one out; `allow_duplicates: true` if it is meant, for example to weigh it "
        "double.",
        example="error: the experts `math`, `code` have the same weights in every linear layer, so "
        "that one model would count more than once. Leave out all but one of them, or set "
        "`allow_duplicates` if that is meant. [EPMQ-F17]",
    ),
    "EPMQ-F18": Explanation(
        means="A note. Such an expert pulls the result towards what is there already.",
        cause="The base was given as one of the experts, or a merge of one model.",
        remedy="Leave it out unless its task is one that you want to keep as the merge has it.",
        example="note    EPMQ-F18  expert `code` equals the merged model in every linear layer: it "
        "pulls towards the merge and adds nothing else.",
    ),
    "EPMQ-F19": Explanation(
        means="Rounding towards a model that the merge was not made of makes it worse. Fine-tunes "
        "of one base differ by less than a tenth of the weights' norm, unrelated models by 1.4 of "
        "it.",
        cause="A wrong model under a right name, an expert of another base, or two experts that "
        "were trained against each other.",
        remedy="Compare with the record of the merge; `epmq-gptq inspect` prints all distances and "
        "cosines.",
        example="warning EPMQ-F19  expert `c` is far from the merged model: ‖W_i − W_m‖ is 1.34 of "
        "‖W_m‖ (fine-tunes of one base: below 0.1; unrelated models: 1.4). Make sure that the merge"
        " was made of it.",
    ),
    "EPMQ-F20": Explanation(
        cause="`experts` is empty or no mapping, or no `--expert` was given to `merge`.",
        remedy="Name at least one: `experts: {math: org/math-expert@revision}`.",
        example="error: recipe: `experts` should map at least one name to a folder or hub id, got "
        "{}. For example `experts: {math: org/math-expert@revision}`. [EPMQ-F20]",
    ),
    "EPMQ-F21": Explanation(
        means="Every expert needs rows of its own task, under its own name.",
        cause="A name is spelled in two ways, or rows of one expert were forgotten.",
        remedy="Use the names under `experts`. An expert without rows: `data_free` in their place "
        "(a stopgap, see the recipes). `--write-recipe FILE` writes down what is known.",
        example="error: calibration is missing for 1 of the 2 experts: `expert1`. Give rows of each"
        " expert's own task: `--calibration expert1=FILE`; for FILE see `epmq-gptq quantize "
        "--help`, and `--write-recipe FILE` writes down the rest. [EPMQ-F21]",
    ),
    "EPMQ-F22": Explanation(
        cause="The file is empty, or its rows have no tokens.",
        remedy="Give rows of that expert's task, or `data_free`.",
        example="error: `calibration.math`: `math.jsonl` is empty: it holds no rows. Give rows of "
        "that expert's own task. [EPMQ-F22]",
    ),
    "EPMQ-F23": Explanation(
        means="With fewer tokens than a layer has inputs, the expert says nothing about most "
        "directions of the layer, and the anchor to the merge decides there.",
        cause="A handful of short rows.",
        remedy="Give more or longer rows: 128 rows of 512 tokens are 16 per input at a width of "
        "4096. `alpha` must be above 0 where the tokens are fewer than the width.",
        example="warning: expert `math` has 3 calibration tokens, less than a quarter of the width "
        "d_in of layers with 32, 64 inputs: its Gram says little there and the merge decides. Give "
        "more rows of that expert's task. [EPMQ-F23]",
    ),
    "EPMQ-F24": Explanation(
        cause="`samples` is larger than the file, or with `concat` larger than the blocks in it.",
        remedy="Add rows, or lower `samples`; without `samples` all rows are taken.",
        example="error: `calibration.math`: `math.jsonl`: `samples` asks for 40 rows, there are 12."
        " Add rows or lower `samples`. [EPMQ-F24]",
    ),
    "EPMQ-F25": Explanation(
        cause="Documents are longer than what the model reads at once.",
        remedy="Nothing, if the beginnings are good examples; else set `seqlen`, or `concat: true` "
        "for blocks of exactly that many tokens.",
        example="warning: calibration of expert `math`: 1 of 1 rows were cut to the model's 128 "
        "tokens. [EPMQ-F25]",
    ),
    "EPMQ-F26": Explanation(
        means="Sums run over tokens, so an expert with twenty times the tokens counts twenty times "
        "as much.",
        cause="Rows of very different number or length.",
        remedy="Give like numbers of tokens, or set `weighting: token` (as if all had equally "
        "many) or `trace`.",
        example="warning: expert `math` has 4,750 calibration tokens, `code` has 164: with raw sums"
        ' the first outweighs the other 28 to 1. Set `weighting` to "token" or "trace", or give '
        "rows of like number and length. [EPMQ-F26]",
    ),
    "EPMQ-F27": Explanation(
        cause="float16 overflowed in the merged model, or weights of an earlier layer are damaged.",
        remedy="Set `dtype: bfloat16` or `float32` in the recipe. If it stays, `epmq-gptq inspect "
        "--verify full` looks for weights that are not finite.",
        example="error: expert `math`: the activations at the input of "
        "`model.layers.0.self_attn.q_proj` are not finite (32 of 32 channels, the first is 0; the "
        "first is token 7 (id 91) of row 2 of batch 3 of `math`). "
        "Check that expert's calibration rows and the merged weights of earlier layers; load in "
        "bfloat16 or float32 if float16 overflowed. [EPMQ-F27]",
    ),
    "EPMQ-F28": Explanation(
        cause="A negative, infinite or misspelled `alpha`, in `alpha` itself or `alpha_pattern`.",
        remedy="A number from 0 on, or `auto`. Large is plain GPTQ of the merge.",
        example="error: `quantize`: `alpha` should be finite and not negative, got -1.0. Set "
        "`alpha` to such a value. [EPMQ-F28]",
    ),
    "EPMQ-F29": Explanation(
        means="With `alpha: 0` nothing holds the weights in directions that no row reaches.",
        cause="`alpha: 0` and fewer (or less varied) tokens than the layer has inputs.",
        remedy="Set `alpha` above 0, or give more varied rows.",
        example="error: `model.layers.0.self_attn.q_proj`: alpha = 0 leaves the objective singular:"
        " the Gram has rank 20 of 32 (from 328 tokens). Set `alpha` above 0 or give more varied "
        "calibration rows. [EPMQ-F29]",
    ),
    "EPMQ-F30": Explanation(
        means="The anchor λ is too small beside the Gram for single precision, so H + λI cannot be "
        "factorised. It is never raised behind your back.",
        cause="A very small `alpha`, often with few calibration rows.",
        remedy="Raise `alpha`, for this layer alone with `alpha_pattern`, or give more rows.",
        example="error: `model.layers.0.self_attn.q_proj`: the curvature H + λI is not positive "
        "definite in fp32 at alpha=1e-14. Raise `alpha` (for this layer: `alpha_pattern`) or give "
        "more calibration rows. [EPMQ-F30]",
    ),
    "EPMQ-F31": Explanation(
        cause="A norm of the merged model is zero, or an earlier layer outputs nothing: a merge "
        "that went wrong.",
        remedy="Look at the merged weights before the layer; `dynamic` leaves the layer out.",
        example="error: `model.layers.0.self_attn.q_proj`: every input is zero over 328 calibration"
        " tokens. Check the merged weights before it (a norm of zeros?), or leave the layer out "
        "with `dynamic`. [EPMQ-F31]",
    ),
    "EPMQ-F32": Explanation(
        cause="A line is no JSON, empty, lacks the column, or holds token ids that the merged model"
        " does not have; `messages` without a chat template; an image that cannot be opened.",
        remedy="The error names the file and the line. Correct it there.",
        example="error: `calibration.math`: `math.jsonl`, line 1: token id 999999 has no embedding "
        "in the merged model, which has 260. Make the ids with the merged model's tokenizer. "
        "[EPMQ-F32]",
    ),
    "EPMQ-F33": Explanation(
        cause="`bits` or `group_size` is none that GPTQ has, or the group size does not divide the "
        "inputs of a layer.",
        remedy="Choose a divisor (32, 64 or 128 fit most models), `-1` for one group per row, or "
        "other values for single layers with `dynamic`.",
        example="error: `group_size` 128 does not divide the 32 inputs of "
        "`model.layers.0.self_attn.q_proj`; `group_size` 128 does not divide the 64 inputs of "
        "`model.layers.0.mlp.down_proj`. Choose a divisor, or -1 for one group per row. [EPMQ-F33]",
    ),
    "EPMQ-F34": Explanation(
        means="Adapters are used without merging them, exactly or not at all.",
        cause="A LoHa, LoKr, IA³ or VeRA adapter, PiSSA or another initialisation that changes the "
        "base, a rank that contradicts the file; or an adapter where `merge` needs a whole "
        "model.",
        remedy="Merge it with PEFT (`merge_and_unload()`), save that model and give its folder.",
        example="error: expert `math`: `peft_type` is LOHA; only LORA adapters are supported. Merge"
        " the adapter into its base with peft (`merge_and_unload()`) and give that model. "
        "[EPMQ-F34]",
    ),
    "EPMQ-F35": Explanation(
        cause="The merged model says what it was made of, but the models are on another machine, "
        "or a folder of that name holds something else; or the folder says nothing.",
        remedy="Say where they are (`--expert name=folder`), or write a recipe.",
        example="error: the merged model: `merged` was made of models that are not on this machine:"
        " `code` (`code`), `chat` (`chat`). Say where they are: `--expert code=...` `--expert "
        "chat=...`. [EPMQ-F35]",
    ),
    "EPMQ-F36": Explanation(
        means="Rows of text are encoded by the merged model's tokenizer, so they are safe; rows of "
        "token ids that the expert's tokenizer made may mean other words.",
        cause="The expert has added or reordered tokens.",
        remedy="Give rows as text, or ids made by the merged model's tokenizer.",
        example="warning: expert `math`: 1 tokens have other ids ('a' 1 instead of 68); it lacks "
        "259 tokens of the merged model's. The merged model's tokenizer is used; do not give rows "
        "of token ids that the expert's made. [EPMQ-F36]",
    ),
    "EPMQ-F37": Explanation(
        cause="`lm_head: true` with a model whose head is its embedding.",
        remedy="Leave `lm_head` out.",
        example="error: `lm_head` is set, but `lm_head` shares its weight with the embedding "
        "(`tie_word_embeddings`), which stays as it is. Leave `lm_head` out. [EPMQ-F37]",
    ),
    "EPMQ-F38": Explanation(
        cause="GPTQModel has no definition of this architecture, or it has layers that are neither "
        "`nn.Linear` nor `Conv1D`, or it reads images and text together.",
        remedy="The README lists the architectures that were tested; others that GPTQModel defines "
        "go the same way.",
        example="error: GPTQModel cannot load `merged` with these options: Unrecognized "
        "configuration class <class "
        "'transformers.models.perceiver.configuration_perceiver.PerceiverConfig'> for this kind of "
        "AutoModel: AutoModelForCausalLM. [...] Its documentation lists the architectures and "
        "options that it supports. [EPMQ-F38]",
    ),
    "EPMQ-F40": Explanation(
        means="What was done is committed. The command left with exit code 75.",
        cause="Ctrl-C or SIGTERM came to a run with `--resume`.",
        remedy="Give the same command again; it goes on at the next layer.",
        example="error: the run was stopped after 12 of 32 layers, which are committed in "
        "`unfinished`. Start it again with the same checkpoint folder to go on. [EPMQ-F40]",
    ),
    "EPMQ-F41": Explanation(
        means="A run goes on only as it began: options, rows, the weights of every model and the "
        "versions are compared, the weights by their content.",
        cause="An option was changed, an expert was trained further, a package was upgraded.",
        remedy="Set back what is named, or give a new folder and begin anew.",
        example="error: the checkpoint in `unfinished` is of another run: `bits` was 4, is 3; "
        "expert `math` changed. Set that back to go on, or give a new folder to begin anew. "
        "[EPMQ-F41]",
    ),
    "EPMQ-F42": Explanation(
        cause="Files of the folder were removed or changed by something else, or `resume` forbids "
        "or wants a checkpoint where there is one, or none.",
        remedy="Begin anew in a new folder.",
        example="error: the checkpoint `unfinished` cannot be gone on with: resume='required' but "
        "no checkpoint is published. Give a new folder to begin anew. [EPMQ-F42]",
    ),
    "EPMQ-F43": Explanation(
        cause="The same command runs twice.",
        remedy="Wait for the other one, or give this run a folder of its own.",
        example="error: another process is writing to the checkpoint `unfinished`. Wait for it, or "
        "give this run a folder of its own. [EPMQ-F43]",
    ),
    "EPMQ-F44": Explanation(
        means="Looked at before the run, before the checkpoint is written, and while it is; what "
        "was begun is removed. In Python the model stays in memory, and `save` elsewhere works.",
        cause="The disk of `--out` is nearly full, or that of the temporary folder, where finished "
        "layers wait. A recipe with `merge` needs room for the merged model as well.",
        remedy="Free some space, or choose another disk; the variable TMPDIR moves the temporary "
        "folder. `epmq-gptq inspect` estimates the size.",
        example="error: the run needs a disk with 96,640 bytes free, got 96,639 (71,040 for the "
        "checkpoint, 25,600 for finished layers). Free some space, or choose other disks: `--out` "
        "is where the checkpoint and a temporary merge go, the variable TMPDIR where layers wait. "
        "[EPMQ-F44]",
    ),
    "EPMQ-F45": Explanation(
        cause="The folder is not empty, lies inside a model that is being read, or cannot be "
        "written.",
        remedy="Choose another place, or pass `--overwrite`; sources are never overwritten.",
        example="error: `--out`: folder `taken` is not empty. Choose another one or pass "
        "--overwrite. [EPMQ-F45]",
    ),
    "EPMQ-F46": Explanation(
        means="Fewer rows at once and the CPU were tried before this; no checkpoint was written. "
        "As a warning, before the run: the estimate of its peak is more than what can be had now; "
        "within it: batches did not fit and are run in pieces, which takes longer. Of threads: the "
        "system gave no further one, which is a limit on processes or on this process's memory.",
        cause="Batches that are too large for the device, or another process on it.",
        remedy="A smaller `batch_size`, shorter rows, and for the products of calibration rows a "
        "smaller EPMQ_CHUNK_ROWS in the environment. `nvidia-smi` shows who else holds memory.",
        example="error: `model.layers.0.mlp.down_proj`: counting its inputs: the memory of "
        "`cuda:0` ran out: 2.50 GiB were asked for, 1.12 GiB of 79.10 GiB can be had, this process "
        "has held 77.40 GiB at its peak. Set a smaller `batch_size` or give shorter rows; "
        "EPMQ_CHUNK_ROWS (now 2048) is how many rows are multiplied at once. Other processes may "
        "hold the rest of the memory. [EPMQ-F46]",
    ),
    "EPMQ-F47": Explanation(
        cause="A GPU that fell off the bus, an error of its memory that cannot be corrected, or a "
        "kernel that broke the state of the device.",
        remedy="Start again in a new process, on another device if there is one.",
        example="error: `model.layers.0.mlp.down_proj`: rounding it: `cuda:0` does not answer any "
        "more (`CUDA error: uncorrectable ECC error encountered`). Start again, in a new process: "
        "nothing else can be asked of this device. If it comes back, look at `dmesg` and "
        "`nvidia-smi -q` for errors of the memory. [EPMQ-F47]",
    ),
    "EPMQ-F49": Explanation(
        means="epmq_gptq works inside GPTQModel and looks at the parts that it leans on before "
        "anything else.",
        cause="GPTQModel was upgraded or changed.",
        remedy="Install a version that is named: `pip install 'gptqmodel>=7.6,<7.8'`.",
        example="error: epmq_gptq supports GPTQModel 7.6–7.7, got 8.0.1. Install one of these "
        "versions. [EPMQ-F49]",
    ),
    "EPMQ-F52": Explanation(
        cause="`save` before `quantize`, or `quantize` twice, in Python.",
        remedy="Load, quantize, save, in this order; for another run load the merged model again.",
        example="epmq_gptq.errors.EPMQInputError: `save` came before `quantize`: there is nothing "
        "quantized to save yet. Call `quantize` first.",
    ),
    "EPMQ-F53": Explanation(
        cause="A report or an evaluation of another version of epmq_gptq, or one that was edited "
        "by hand or cut off while it was copied.",
        remedy="Restore the file. A report comes from quantizing and saving again, an evaluation "
        "from `epmq-gptq retention`.",
        example="error: `epmq_report.json`: `schema` should be 1, got 9. Quantize and save again "
        "with this version of epmq_gptq, or restore the file. [EPMQ-F53]",
    ),
    "EPMQ-F54": Explanation(
        means="Figures side by side would say nothing.",
        cause="A baseline of another merge or of other experts; evaluations of models on other "
        "items, with another seed or number of shots; the evaluation of the wrong model.",
        remedy="Make the baseline from the same merge and the same experts with `profile: gptq`, "
        "and evaluate every model with the same options.",
        example="error: `--quantized`: `math` was measured with another `seed` than for "
        "`--expert math`. Evaluate every model in the same way, and name experts as in the run. "
        "[EPMQ-F54]",
    ),
    "EPMQ-F55": Explanation(
        means="Statistics say how the experts differ from one merge, layer by layer: with other "
        "weights in its place they mean nothing.",
        cause="The merge was made anew, or saved in another precision; or the statistics were "
        "recorded without what is asked for now: held-out rows, biases, a layer.",
        remedy="Give the merge as it was, or record anew: quantize with `save_statistics: true`.",
        example="error: the merged model `expert0` is not the one that the statistics are of: its "
        "SHA-256 is a03761f02fdc…, theirs 1cf45eda6a3e…. Give the weights of `merged` as they "
        "were. [EPMQ-F55]",
    ),
    "EPMQ-F56": Explanation(
        cause="`epmq-gptq check` was given the merge itself, or a checkpoint of another kind of "
        "quantization.",
        remedy="Give the folder that was written by `quantize`, or by GPTQModel.",
        example="error: the checkpoint: no GPTQ checkpoint: it holds no packed layer "
        "(`….qweight`). Give the folder that `save` or GPTQModel wrote. [EPMQ-F56]",
    ),
    "EPMQ-F57": Explanation(
        means="A configuration is data. This one would make transformers run code that its author "
        "chose: a kernel of the hub, or a module of the model's folder.",
        cause="`attn_implementation` in `config.json` is a hub id: a trap, or a model that was "
        "saved while such a kernel was in use. Or transformers does not know the architecture, and "
        "`auto_map` names a module for it.",
        remedy="Remove the key from `config.json`, if you know who wrote it; results do not depend "
        "on it. For a module, pass `trust_remote_code=True` in Python once you have read it.",
        example="error: `merged`: `config.json` has `attn_implementation` 'org/kernel', for which "
        "transformers would fetch code from the hub and run it. Remove the key, if you know who "
        "wrote the file; no model needs it. [EPMQ-F57]",
    ),
    "EPMQ-H01": Explanation(
        means="A warning. Every fast kernel is compared with its reference on your device before "
        "it is used.",
        cause="No nvcc and no Triton on a machine with a GPU, or a kernel that is not exact there.",
        remedy="Install the extra `triton` or a CUDA toolkit, or go on: the result is the same.",
        example="warning: neither nvcc nor a Triton that rounds exactly was found, so columns are "
        "rounded by a loop of torch operations: the same result, in more time. [EPMQ-H01]",
    ),
    "EPMQ-N01": Explanation(
        means="Nothing that holds such a number is saved.",
        cause="A merged weight so large that a scale overflows half precision, or numbers at the "
        "edge of single precision.",
        remedy="Look at the named layer's weights. `on_bad_module: rtn` rounds it to nearest and "
        "records that; `dynamic` leaves it out.",
        example="error: `model.layers.0.self_attn.v_proj`: scales holds 1 non-finite value, the "
        "first at index (2, 0). Find where it came from; nothing sensible can be made of it. "
        "[EPMQ-N01]",
    ),
    "EPMQ-O01": Explanation(
        cause="A word where a number belongs, a choice that does not exist, a missing `=`.",
        remedy="The error says what is allowed and what it got; `--help` shows the options.",
        example="error: `--device` is `cuda`, but torch sees no GPU here. Use `--device cpu`. "
        "[EPMQ-O01]",
    ),
    "EPMQ-O02": Explanation(
        cause="A spelling mistake in a recipe, in `--set` or on the command line.",
        remedy="The error proposes the option that was probably meant.",
        example="error: `quantize`: `group_sise` is not an option of EPMQConfig. Did you mean "
        "`group_size`? [EPMQ-O02]",
    ),
    "EPMQ-O03": Explanation(
        cause="Two options that cannot go together, one that needs another, or an option of "
        "GPTQModel that would undo what E-PMQ does.",
        remedy="Give the one that you have, or follow the hint.",
        example="error: `quantize`: `data_free` needs `base`: a task vector is an expert minus the "
        "model it was fine-tuned from. Set `base` to that model's folder or hub id. [EPMQ-O03]",
    ),
    "EPMQ-O04": Explanation(
        cause="A recipe that is no YAML, a key that is given twice, a file that is not there, or "
        "a recipe of another version.",
        remedy="Correct it at the line that is named.",
        example="error: recipe `no.yaml` is not readable: No such file or directory. Give a YAML "
        "file, or a JSON file named .json. [EPMQ-O04]",
    ),
    "EPMQ-S01": Explanation(
        means="A checkpoint is written beside its place, read back, and moved there when it is "
        "right. Here it was not.",
        cause="A disk that loses data, or a full one that does not say so.",
        remedy="Nothing was left there, and the model is still in memory: `save` again, if need be "
        "to another disk.",
        example="error: the written checkpoint: shard `model.safetensors` (160,558 bytes, 160,568 "
        "expected) is damaged: Error while deserializing header: incomplete metadata, file not "
        "fully covered. Nothing was left there and the model is still in memory: `save` again, if "
        "need be to another disk. [EPMQ-S01]",
    ),
    "EPMQ-S02": Explanation(
        means="A warning. The folder that stood there before is at its place again, whole; of the "
        "new one nothing is left.",
        cause="The process was killed, or the machine went down, between two renames at the end of "
        "a save with `overwrite`. Where the system can exchange two folders in one step, as Linux "
        "can, there is no such moment.",
        remedy="Run it again with `overwrite` if the folder is still to be replaced.",
        example="warning: a save to `out` was cut off while it replaced the folder that stood "
        "there; that one was put back. [EPMQ-S02]",
    ),
    "EPMQ-P01": Explanation(
        means="Nothing was sent.",
        cause="A configuration that was edited, a path of this machine or an access token in a "
        "file, a card that the hub does not take.",
        remedy="Correct the named file; `epmq-gptq push DIR REPO --dry-run` checks again.",
        example="error: the checkpoint: `quantize_config.json` holds a path of a machine in "
        "`note`. Write a name in its place; nobody else has this path. [EPMQ-P01]",
    ),
    "EPMQ-P02": Explanation(
        cause="No login on this machine, a token that was revoked or may only read, or an "
        "organization that one is no member of.",
        remedy="`hf auth login` with a token that may write, or `--create-pr`, which needs no "
        "right to write.",
        example="error: there is no access token for the hub on this machine. Make one with the "
        "right to write on the hub's page Settings, Access Tokens; then `hf auth login`, or set "
        "`HF_TOKEN`. [EPMQ-P02]",
    ),
    "EPMQ-P03": Explanation(
        cause="A commit in place of a branch, a repository of others, or one that holds another "
        "model, or that somebody changed meanwhile.",
        remedy="Give a branch or a repository of your own.",
        example="error: `revision` should be a branch (a commit cannot be pushed to) or "
        "`refs/pr/N`, got '0123456789012345678901234567890123456789'. Set `revision` to such a "
        "value. [EPMQ-P03]",
    ),
    "EPMQ-P04": Explanation(
        means="The repository shows nothing of it: all files appear with one commit at the end.",
        cause="The connection broke, or the hub or its storage did not answer.",
        remedy="Push again: what was uploaded is not sent twice.",
        example="error: the upload to `me/merged-4bit` did not come to its end: [Errno 111] "
        "Connection refused. Nothing of it shows in the repository. Push again: what was uploaded "
        "is not sent twice. [EPMQ-P04]",
    ),
}

# What the letter of a code says.
KINDS = {
    "F": "faults of the inputs or of the numbers",
    "H": "the host and the machine",
    "N": "numbers of the result",
    "O": "options and files of options",
    "S": "saving",
    "P": "publishing",
}


def explained_codes() -> list[str]:
    """The codes that have an entry, in the order of the table."""
    return sorted(_ENTRIES, key=list(CODES).index)


def explanation(code: str) -> Explanation:
    """The entry of a code; ``f30`` and ``F30`` are enough of it.

    Raises:
        EPMQInputError: there is no such code.
    """
    full = full_code(code)
    if full in _ENTRIES:
        return _ENTRIES[full]
    from ..io.declared import closest  # pydantic, which a shell that completes does not wait for

    meant = closest(full, _ENTRIES)
    raise EPMQInputError(
        f"`{code[:40]}` is no error code.",
        code="EPMQ-O02",
        subject="the code",
        remedy=f"Did you mean `{meant}`?" if meant else "They look like EPMQ-F30.",
    )


def full_code(code: str) -> str:
    """``f30`` as ``EPMQ-F30``, also out of brackets."""
    short = code.strip().strip("[]").upper()
    return short if short.startswith("EPMQ-") else f"EPMQ-{short}"


def as_dict(code: str) -> dict[str, Any]:
    """An entry as plain data."""
    full, entry = full_code(code), explanation(code)
    return {
        "code": full,
        "title": CODES[full],
        "means": entry.means,
        "cause": entry.cause,
        "remedy": entry.remedy,
        "example": entry.example,
    }


def entry_table(entry: dict[str, str]) -> Table:
    """An entry of :func:`as_dict` for a terminal."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(entry["code"], "bold"), Text(f"{entry['title']}.", "bold"))
    for name, key in (
        ("", "means"),
        ("usually", "cause"),
        ("what to do", "remedy"),
        ("example", "example"),
    ):
        if entry[key]:
            grid.add_row(Text(name, "dim"), Text(entry[key]))
    return grid


def codes_table(entries: Iterable[dict[str, str]]) -> Table:
    """One line per code."""
    table = Table("code", "what it stands for")
    for entry in entries:
        table.add_row(entry["code"], Text(entry["title"]))
    return table
