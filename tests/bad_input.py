"""What cannot be done, by subcommand: the words after `slsam-peft`, and what its message must say.

Paths are those of the folder that `tests/integration/test_bad_input.py` makes.
"""

Case = tuple[list[str], list[str]]

SFT = ["sft", "--model_name_or_path", "model", "--dataset_name", "train.jsonl", "--output_dir", "out", "--use_peft"]
SFT += ["--use_cpu", "--bf16", "false", "--report_to", "none"]
PLAN = ["plan", "--model", "smollm2-135m"]
FLAT = ["sharpness", "adapter", "--data", "train.jsonl", "--dtype", "float32"]

WORDS: list[tuple[list[str], str]] = [
    (["quikstart"], "no subcommand 'quikstart'. Did you mean 'quickstart'?"),
    (["quickstart", "--epoch", "3"], "does not know '--epoch'. Did you mean '--epochs'?"),
    (["quickstart", "--lernin-rate=3"], "Did you mean '--learning_rate'?"),
    (["--vresion"], "does not know '--vresion'. Did you mean '--version'?"),
    (["quickstart", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["quickstart", "--epochs"], "argument --epochs: expected one argument"),
    (["quickstart", "stray"], "does not know 'stray'"),
    (["quickstart", "--lr", "1e-3"], "does not know '--lr'. Did you mean '--learning_rate'?"),
    (["quickstart", "--num_train_epochs", "2"], "does not know '--num_train_epochs'. Did you mean '--epochs'?"),
    (["quickstart", "--output_dir", "a"], "does not know '--output_dir'. Did you mean '--output'?"),
    (["chat", "--adapter", "adapter", "adapter"], "It is given without a flag: slsam-peft chat ADAPTER."),
    (["sft"], "there is no model and no data set; add --model_name_or_path NAME --dataset_name NAME, or"),
    (["sft", "--model_name_or_path", "model"], "there is no data set; add --dataset_name NAME"),
    (["sft", "--learning-rat", "1"], "there is no setting --learning-rat."),
]

QUICKSTART: list[tuple[list[str], str]] = [
    (["--epochs", "0"], "--epochs=0 is not allowed; it must be an integer >= 1."),
    (["--batch_size", "-2"], "--batch_size=-2 is not allowed"),
    (["--lora_r", "0"], "--lora_r=0 is not allowed"),
    (["--n_test", "0"], "--n_test=0 is not allowed"),
    (["--learning_rate", "0"], "--learning_rate=0.0 is not allowed; it must be a finite number > 0."),
    (["--learning_rate", "nan"], "--learning_rate=nan is not allowed"),
    (["--slsam_learning_rate", "0"], "--slsam_learning_rate=0.0 is not allowed; it must be a finite number > 0."),
    (["--slsam_learning_rate", "inf"], "--slsam_learning_rate=inf is not allowed"),
    (["--label_noise", "1.5"], "--label_noise=1.5 is not allowed; it is a share in [0, 1]."),
    (["--label_noise", "nan"], "--label_noise=nan is not allowed; it is a share in [0, 1]."),
    (["--n_train", "4", "--label_noise", "0.25"], "--label_noise=0.25 of --n_train=4 pairs is 1; at least 2 answers"),
    (["--n_train", "99999"], "--n_train=99999 is not allowed; this Python's documentation gives 1 to"),
    (["--n_test", "99999"], "--n_test=99999 is not allowed; this Python's documentation gives 1 to"),
    (["--seed", "-1"], "--seed=-1 is not allowed; it must be an integer >= 0."),
    (["--dtype", "float8"], "invalid choice: 'float8'"),
    (["--model", "./nowhere"], "is not a folder; name one with a model in it, or a Hub name."),
    (["--output", "full"], "--output=full is not empty. Name another folder, or add --force"),
    (["--output", "file"], "--output=file is a file; name a folder."),
    (["--output", "file/below"], "--output=file/below cannot be made: "),
    (["--output", "/proc/adapter"], "--output=/proc/adapter cannot be made: "),  # to root as well
]

SFT_FLAGS: dict[str, Case] = {
    "rho negative": (["--rho", "-1"], ["rho=-1.0", ">= 0"]),
    "rho nan": (["--rho", "nan"], ["rho=nan", "finite"]),
    "rho infinite": (["--rho", "inf"], ["rho=inf", "finite"]),
    "rho no number": (["--rho", "big"], ["--rho", "'big'"]),
    "fraction zero": (["--active_fraction", "0"], ["active_fraction=0.0", "(0, 1]"]),
    "fraction above one": (["--active_fraction", "1.5"], ["active_fraction=1.5", "(0, 1]"]),
    "unknown bandit": (["--bandit", "scalefree"], ["bandit='scalefree'", "Did you mean 'scale_free'?"]),
    "unknown design": (["--design", "depht"], ["design='depht'", "Did you mean 'depth'?"]),
    "seed negative": (["--slsam_seed", "-3"], ["slsam_seed=-3", "integer >= 0"]),
    "unknown flag": (["--active_fractoin", "0.5"], ["--active_fractoin", "Did you mean '--active_fraction'?"]),
    "abbreviated flag": (["--active_frac", "0.5"], ["there is no setting --active_frac"]),
    "another name of the rate": (["--lr", "1e-3"], ["no setting --lr. Did you mean '--learning_rate'?"]),
    "another name of the dtype": (["--torch_dtype", "float32"], ["Did you mean '--dtype'?"]),
    "another name of the rank": (["--lora-rank", "4"], ["Did you mean '--lora_r'?"]),
    "another name of the length": (["--max_seq_length", "4"], ["Did you mean '--max_length'?"]),
    "two unknown flags": (["--rhoo", "1", "--lrate=3"], ["--rhoo", "--lrate"]),
    "stray word": (["recipe.yaml"], ["'recipe.yaml'", "--config recipe.yaml"]),
    "value missing": (["--rho"], ["--rho", "expected one argument"]),
    "config without file": (["--config"], ["--config", "YAML file"]),
    "config twice": (["--config", "a.yaml", "--config=b.yaml"], ["--config is given 2 times"]),
    "config missing": (["--config", "gone.yaml"], ["config file gone.yaml does not exist"]),
    "config is a folder": (["--config", "model"], ["config file model cannot be read", "directory"]),
    "unknown trainer value": (["--lr_scheduler_type", "cosin"], ["lr_scheduler_type", "'cosin'"]),
    "4 bit without adapters": (["--use_peft", "false", "--load_in_4bit"], ["load_in_4bit without use_peft"]),
    "4 and 8 bit": (["--load_in_4bit", "--load_in_8bit"], ["8 bit and 4 bit"]),
    "no data set": (["--dataset_name", ""], ["there is no data set", "--dataset_name NAME"]),
    "data file missing": (["--dataset_name", "gone.jsonl"], ["gone.jsonl does not exist"]),
    "evaluation without data": (["--eval_strategy", "epoch"], ["no split 'test'", "held-out file"]),
    "held-out file missing": (
        ["--eval_strategy", "epoch", "--dataset_test_split", "gone.jsonl"],
        ["gone.jsonl does not exist"],
    ),
    "no model": (["--model_name_or_path", ""], ["there is no model", "--model_name_or_path NAME"]),
    "model folder missing": (["--model_name_or_path", "./gone"], ["model folder ./gone does not exist"]),
    "model folder empty": (["--model_name_or_path", "void"], ["model void cannot be loaded"]),
    "model without classes": (["--model_name_or_path", "bare"], ["model bare cannot be loaded", "'architectures'"]),
    "model without weights": ([], ["model cannot be trained with these settings", "model.safetensors"]),
    "output below a file": (["--output_dir", "train.jsonl/out"], ["output_dir=train.jsonl/out", "cannot be written"]),
    "output is a file": (["--output_dir", "train.jsonl"], ["output_dir=train.jsonl cannot be written"]),
    "output not writable": (["--output_dir", "/proc/slsam/out"], ["output_dir=/proc/slsam/out cannot be written"]),
    "nothing to resume": (["--resume_from_checkpoint", "true"], ["output_dir=out has no intact checkpoint-<step>"]),
    "no checkpoint": (["--resume_from_checkpoint", "model"], ["model is no checkpoint", "trainer_state.json"]),
}

SFT_FILES: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["is empty", "must be a mapping"]),
    "a list": ("- rho\n- 0.1\n", ["holds a list", "must be a mapping"]),
    "a word": ("rho\n", ["holds a str", "must be a mapping"]),
    "no YAML": ("rho: 0.1\nbandit: [paper\n", ["line 3", "not valid YAML"]),
    "tabs": ("rho:\n\t- 1\n", ["line 2", "not valid YAML"]),
    "code": ("rho: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "python/object/apply"]),
    "unknown key": ("rho: 0.1\nactive_fractoin: 0.5\n", ["line 2", "'active_fractoin'", "'active_fraction'"]),
    "two unknown keys": ("lr: 0.1\nrhoo: 0.5\n", ["line 1", "'lr'", "'learning_rate'", "line 2", "'rhoo'", "'rho'"]),
    "key twice": ("rho: 0.1\nbandit: paper\nrho: 0.2\n", ["line 3", "rho is set in line 1 already"]),
    "no value": ("rho_max:\n", ["line 1", "rho_max: has no value"]),
    "not a number": ("rho: [0.1]\n", ["rho: [0.1] is not allowed", "a number"]),
    "truth for a number": ("rho: true\n", ["rho: True is not allowed", "a number"]),
    "fraction for an integer": ("max_steps: 2.5\n", ["max_steps: 2.5 is not allowed", "an integer"]),
    "word for an integer": ("max_steps: many\n", ["--max_steps", "'many'"]),
    "number for truth": ("use_peft: 3\n", ["use_peft: 3 is not allowed", "true or false"]),
    "unknown choice": ("bnb_4bit_quant_type: nf5\n", ["'nf5' is not allowed", "fp4, nf4", "Did you mean 'nf4'?"]),
    "bare no": ("save_strategy: no\n", ["save_strategy: False is not allowed", "in quotes"]),
    "value out of range": ("rho: -0.5\n", ["rho=-0.5", ">= 0"]),
}

PLAN_FLAGS: list[tuple[list[str], str]] = [
    (["plan", "--model", "llama3.1-8b"], "Did you mean 'llama-3.1-8b'?"),
    (["plan", "--model", "bare-folder"], "holds no config.json"),
    (["plan", "--model", "plan-broken.json"], "no configuration for model"),
    (["plan", "--model", "plan-strange.json"], "no configuration for model"),
    ([*PLAN, "--optim", "adamw"], "--optim='adamw' is not known"),
    ([*PLAN, "--cost_budget", "0.3", "--design", "depth"], "out of reach"),
    ([*PLAN, "--cost_budget", "9"], "out of reach"),
    ([*PLAN, "--cost_budget", "1", "--active_fraction", "0.5"], "both set"),
    ([*PLAN, "--active_fraction", "0.01"], "less than one arm"),
    ([*PLAN, "--active_fraction", "1.5"], "active_fraction=1.5"),
    ([*PLAN, "--ascent", "partial", "--batch_size", "1"], "and there is one"),
    ([*PLAN, "--ascent", "remembered", "--descent", "all"], "has none"),
    ([*PLAN, "--ascent", "ahead"], "or active_fraction=1"),
    (
        [*PLAN, "--ascent", "ahead", "--active_fraction", "1", "--gradient_accumulation_steps", "2"],
        "of one micro-batch",
    ),
    ([*PLAN, "--lora_target_modules", "no_such"], "no_such"),
    ([*PLAN, "--max_length", "1"], "--max_length=1"),
    ([*PLAN, "--memory", "0"], "--memory=0.0 is not allowed; it must be a finite number above 0."),
    ([*PLAN, "--use_bnb_nested_quant"], "needs --load_in_4bit"),
    ([*PLAN, "--gradient_checkpointing", "maybe"], "neither true nor false"),
    ([*PLAN, "--per_device_train_batch_size", "4"], "Did you mean '--batch_size'?"),
    ([*PLAN, "--cost_bugdet", "1"], "Did you mean '--cost_budget'?"),
    (["plan"], "--model"),
    (["plan", "--model", "nobody/nothing"], "no configuration for model 'nobody/nothing'"),
]

# A comparison that is allowed, and changes that are not.
COMPARISON = """
model: small
training: {steps: 2}
tasks: {docs: {source: stdlib_docs, rows: 4}}
methods:
  plain: {learning_rates: [1.0e-3]}
  sam: {learning_rates: [1.0e-3], slsam: {rho: 0.1, active_fraction: 1.0}}
seeds: [0]
tuning_seed: 1
"""
COMPARISONS: dict[str, tuple[str, str, str]] = {
    "unknown method setting": ("rho: 0.1", "roh: 0.1", "Did you mean 'rho'?"),
    "unknown task": ("stdlib_docs", "stdlib_doc", "Did you mean 'stdlib_docs'?"),
    "no rows": (", rows: 4", "", "tasks.docs.rows is missing"),
    "tuned on a reported seed": ("tuning_seed: 1", "tuning_seed: 0", "on a seed that is not reported"),
    "rate no number": ("[1.0e-3]}", "[fast]}", "'fast' is not allowed; it must be a finite number > 0"),
    "radius set twice": (
        "slsam: {rho: 0.1,",
        "rhos: [0.5], slsam: {rho: 0,",
        "methods.sam.rhos and slsam.rho are both set",
    ),
    "radii no list": ("slsam: {rho: 0.1,", "rhos: 0, slsam: {", "rhos=0 must be a list of one or more numbers."),
    "dropout no share": ("steps: 2", "steps: 2, lora_dropout: 1.5", "training.lora_dropout=1.5 is not allowed"),
    "no YAML": ("seeds: [0]", "seeds: [0", "is not valid YAML"),
    "seed no number": ("seeds: [0]", "seeds: [one]", "'one' is not allowed; a seed is an integer >= 0"),
    "decay no number": ("steps: 2", "steps: 2, weight_decay: no", "weight_decay=False is not allowed"),
    "partial ascent of one": (
        "slsam: {rho: 0.1, active_fraction: 1.0}",
        "batch_size: 1, slsam: {ascent: partial}",
        "methods.sam: ascent='partial' takes a part of a step's sequences, and batch_size=1 has one",
    ),
}
# What only the model, the trainer or the data show.
COMPARISONS_LATE: dict[str, tuple[str, str, str]] = {
    "model folder missing": ("small", "./gone", "model folder ./gone does not exist"),
    "model unknown": ("small", "nobody/nothing", "model nobody/nothing cannot be read: "),
    "model folder empty": ("small", "./void", "model void cannot be read: "),
    "less than one arm": (
        "active_fraction: 1.0",
        "active_fraction: 0.01",
        "methods.sam: active_fraction=0.01 of 5 arms is less than one arm; use at least 0.2",
    ),
    "budget out of reach": ("active_fraction: 1.0", "cost_budget: 9", "methods.sam: cost_budget=9"),
    "unknown schedule": ("steps: 2", "steps: 2, lr_scheduler_type: cosin", "Did you mean 'cosine'?"),
    "schedule with options": ("steps: 2", "steps: 2, lr_scheduler_type: cosine_with_min_lr", "min_lr"),
    "puzzle misspelt": (
        "source: stdlib_docs",
        "source: reasoning_gym, puzzle: basic_aritmetic",
        "tasks.docs: puzzle='basic_aritmetic' is not one of reasoning-gym's",
    ),
    "puzzle's options": (
        "source: stdlib_docs",
        "source: reasoning_gym, puzzle: basic_arithmetic, puzzle_options: {terms: 2}",
        "tasks.docs: puzzle='basic_arithmetic' with {'terms': 2}: ",
    ),
    "data file missing": (
        "source: stdlib_docs",
        "source: jsonl, file: gone.jsonl",
        "tasks.docs: data file gone.jsonl does not exist",
    ),
    "answers cut off": (
        "steps: 2",
        "steps: 2, max_length: 2",
        "tasks.docs: no train row has an answer within max_length=2 tokens; raise training.max_length.",
    ),
    "no chat template": ("small", "untemplated", "tasks.docs: the model's tokenizer takes no conversation: "),
    "too few rows": ("rows: 4", "rows: 40000", "tasks.docs: source='stdlib_docs': n_train=40000 is not allowed"),
}
COMPARE: list[tuple[list[str], str]] = [
    (["compare"], "there is nothing to compare; name your data, --data FILE, or a comparison's YAML file"),
    (["compare", "--config", "good.yaml", "--data", "train.jsonl"], "--config and --data are both given"),
    (
        ["compare", "--config", "good.yaml", "--runs", "12"],
        "--runs belongs to --data; with --config the YAML",
    ),
    (["compare", "--config", "good.yaml", "--output", "a"], "--output belongs to --data"),
    (["compare", "--data", "train.jsonl"], "train.jsonl: 2 rows are too few. A comparison needs 48 with different"),
    (["compare", "--data", "gone.jsonl"], "data file gone.jsonl does not exist"),
    (["compare", "--data", "data/cut/a.jsonl"], "data/cut/a.jsonl, line 2: not valid JSON"),
    (["compare", "--data", "train.jsonl", "--run", "12"], "does not know '--run'. Did you mean '--runs'?"),
    (["compare", "--data", "train.jsonl", "--learning_rate", "0"], "--learning_rate: 0.0 is not allowed"),
    (["compare", "--data", "train.jsonl", "--dtype", "float16"], "--dtype='float16' is not known"),
    (["compare", "--data", "train.jsonl", "--output", "/proc/a"], "/proc/a cannot be written: "),
    (["compare", "--config", "gone.yaml"], "config file gone.yaml cannot be read: No such file"),
    (["compare", "--config", "model"], "config file model cannot be read: Is a directory"),
    (["compare", "--config", "good.yaml", "--limit", "-1"], "--limit=-1 is not allowed; it must be an integer >= 0."),
    (["compare", "--config", "good.yaml", "--metric", "lost"], "invalid choice: 'lost'"),
    (
        ["compare", "--config", "good.yaml", "--table", "file"],
        "file exists already. Name another file, or pass --force",
    ),
    (["compare", "--config", "good.yaml", "--table", "gone/a.md"], "the folder of gone/a.md does not exist"),
    (["compare", "--config", "good.yaml", "--plot", "a.pdf"], "--plot a.pdf: the name must end in .png or .svg."),
    (["compare", "--config", "good.yaml", "--table", "/proc/a.md"], "/proc/a.md cannot be written: "),
    (["compare", "--config", "good.yaml", "--results", "full"], "full is a folder; name a file in it."),
    (["compare", "--config", "good.yaml", "--results", "gone/r.jsonl"], "the folder of gone/r.jsonl does not exist."),
    (["compare", "--config", "good.yaml", "--results", "/proc/r.jsonl"], "/proc/r.jsonl cannot be written: "),
    (["compare", "--config", "good.yaml", "--results", "full", "--report"], "rows cannot be read from full: "),
]
BENCH: list[tuple[list[str], str]] = [
    (["--steps", "0"], "0 is not allowed; it must be at least 1"),
    (["--rounds", "many"], "argument --rounds"),
    (["--output", "file"], "file exists already. Name another file, or pass --force to overwrite it."),
    (["--output", "full", "--force"], "full is a folder; name a file in it."),
    (["--output", "gone/b.json"], "the folder of gone/b.json does not exist. Make it first, or name another file."),
    (["--output", "/proc/b.json"], "/proc/b.json cannot be written: "),
    (["--plot", "b.pdf"], "--plot b.pdf: the name must end in .png or .svg."),
    (["--model", "./gone", "--output", "b.json"], "model folder ./gone does not exist"),
    (["--model", "nobody/nothing", "--output", "b.json"], "model nobody/nothing could not be loaded: "),
]
ADAPTERS: list[tuple[list[str], str]] = [
    (["check"], "required: ADAPTER"),
    (["check", "gone"], "adapter folder gone does not exist (from "),
    (["check", "full"], "full holds no adapter: adapter_config.json is missing. Name the folder"),
    (["check", "small"], "small holds a full model, not an adapter"),
    (["check", "adapters/settings"], "adapter_config.json cannot be read: "),
    (["check", "adapters/cut"], "adapter_model.safetensors is damaged ("),
    (["check", "adapters/header"], "adapter_model.safetensors is damaged ("),
    (["check", "adapters/missing"], "adapter_model.safetensors does not exist."),
    (["check", "adapters/pickle"], "adapter_model.bin is a pickle and is not read; save the adapter again."),
    (["check", "adapters/task"], "is an adapter for SEQ_CLS; adapters of causal language models work."),
    (["check", "adapter", "--model", "./gone"], "--model=./gone is not a folder; name one with a model in it"),
    (["check", "adapter", "--model", "nobody/nothing"], "base model nobody/nothing cannot be read: "),
    (["export", "adapter"], "required: --output"),
    (["export", "gone", "--output", "new"], "adapter folder gone does not exist (from "),
    (["export", "adapter", "--output", "full"], "full is not empty"),
    (["export", "adapter", "--output", "full", "--force"], "--force replaces earlier exports only"),
    (["export", "adapter", "--output", "file"], "file is a file"),
    (["export", "adapter", "--output", "/proc/new"], "/proc/new"),
    (["export", "adapter", "--output", "adapter/new"], "--output=adapter/new lies in adapter, which is read"),
    (["export", "adapter", "--output", "new", "--base", "original"], "--base belongs to a merge; add --merge"),
    (["export", "adapter", "--output", "new", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["export", "adapter", "--output", "new", "--max_shard_size", "big"], "'big' is not allowed; a size looks like"),
    (["export", "adapter", "--output", "new", "--merge", "--rows", "0"], "--rows=0 is not allowed"),
    (["export", "adapters/shape", "--output", "new", "--merge"], "does not fit small: "),
    (["export", "adapter", "--output", "new", "--merge", "--model", "model"], "does not fit model: "),
    (["export", "adapters/base", "--output", "new", "--merge", "--no_measure"], "is damaged or missing ("),
    (["sharpness", "gone", "--data", "train.jsonl"], "adapter folder gone does not exist (from "),
    ([*FLAT, "--rho", "0"], "--rho=0.0 is not allowed; it must be a finite number > 0."),
    ([*FLAT, "--draws", "0"], "--draws=0 is not allowed; it must be an integer >= 1."),
    ([*FLAT, "--batch_size", "0"], "--batch_size=0 is not allowed; it must be an integer >= 1."),
    ([*FLAT, "--space", "half"], "invalid choice: 'half'"),
    ([*FLAT, "--output", "file"], "file exists already. Name another file, or pass --force to overwrite it."),
    ([*FLAT, "--output", "/proc/a.json"], "/proc/a.json cannot be written: "),
    ([*FLAT, "--plot", "a.pdf"], "--plot a.pdf: the name must end in .png or .svg."),
    (
        ["sharpness", "adapters/shape", "--data", "train.jsonl", "--dtype", "float32"],
        "the adapter adapters/shape does not fit small: ",
    ),
    ([*FLAT, "--data", "gone.jsonl"], "gone.jsonl does not exist"),
    ([*FLAT, "--data", "data/cut/a.jsonl"], "line 2: not valid JSON"),
]
SEEN: list[tuple[list[str], str]] = [
    (["plot"], "required: RUN"),
    (["plot", "gone"], "gone does not exist; name the output folder of a training"),
    (["plot", "full"], "full holds no slsam_trace.safetensors. SLSAMTrainer writes one"),
    (["plot", "file"], "file is not a trace of SL-SAM, or is damaged ("),
    (["plot", "full", "--output", "a.pdf"], "--output=a.pdf: the name must end in .png or .svg."),
    (["plot", "full", "--output", "gone/a.png"], "--output=gone/a.png: name a file in a folder that exists."),
    (["plot", "gone", "full", "--live"], "--live follows one run, and 2 are named; name one."),
    (["inspect"], "required: ADAPTER_OR_MODEL"),
    (["inspect", "./gone"], "the folder ./gone does not exist"),
    (["inspect", "file"], "file is a file; name the folder it is in."),
    (["inspect", "full"], "full holds neither adapter_config.json nor config.json"),
    (["inspect", "adapters/cut"], "adapter_model.safetensors is damaged ("),
    (["inspect", "adapters/pickle"], "adapter_model.bin is a pickle"),
    (["inspect", "adapter", "--granularity", "layer"], "invalid choice: 'layer'"),
    (["chat"], "required: ADAPTER"),
    (["chat", "gone", "--prompt", "w1"], "adapter folder gone does not exist (from "),
    (["chat", "adapter", "--prompt", " "], "--prompt is empty; give a text"),
    (["chat", "adapter", "--max_new_tokens", "0"], "--max_new_tokens=0 is not allowed"),
    (["chat", "adapter", "--temperature", "nan"], "--temperature=nan is not allowed"),
]
# The command, the package that it lacks, and the extra that brings it.
EXTRAS: list[tuple[list[str], str, str]] = [
    (["plot", "full"], "matplotlib", "plot without --live needs matplotlib; install the extra: pip install 'slsam-p"),
    ([*FLAT, "--plot", "a.png"], "matplotlib", "--plot needs matplotlib; install the extra"),
    (["bench", "--output", "b.json", "--plot", "a.png"], "matplotlib", "--plot needs matplotlib"),
    (["compare", "--config", "good.yaml", "--plot", "a.png"], "matplotlib", "--plot needs matplotlib"),
    (["compare", "--config", "good.yaml"], "scipy", "pip install 'slsam-peft[compare]'"),
    (["compare", "--config", "puzzles.yaml"], "reasoning_gym", "pip install 'slsam-peft[compare]'"),
]
# Checkpoints that training resumes from, each with one file spoilt.
CHECKPOINTS: dict[str, list[str]] = {
    "slsam cut": ["slsam.safetensors is damaged", "resume from an older checkpoint"],
    "slsam flipped": ["slsam.safetensors is damaged", "SHA-256", "resume from an older checkpoint"],
    "slsam missing": ["slsam.safetensors does not exist", "accept_state_mismatch"],
    "state cut": ["checkpoint-2 is not intact: trainer_state.json is cut short"],
    "state missing": ["is no checkpoint", "trainer_state.json"],
    "adapter cut": ["is not intact: adapter_model.safetensors is cut short", "start afresh"],
    "adapter flipped": ["is not intact: adapter_model.safetensors is damaged", "SHA-256", "start afresh"],
    "optimizer flipped": ["is not intact: optimizer.pt is damaged", "SHA-256", "start afresh"],
    "scheduler flipped": ["is not intact: scheduler.pt is damaged", "SHA-256", "start afresh"],
    "random flipped": ["is not intact: rng_state.pth is damaged", "SHA-256", "start afresh"],
    "hashes cut": ["is not intact: slsam_files.json is damaged", "start afresh"],
    "adapter missing": ["is not intact: adapter_model.safetensors is missing", "start afresh"],
    "optimizer cut": ["is not intact: optimizer.pt is cut short", "start afresh"],
    "optimizer missing": ["is not intact: optimizer.pt is missing", "start afresh"],
    "scheduler cut": ["is not intact: scheduler.pt is cut short", "start afresh"],
    "scheduler missing": ["is not intact: scheduler.pt is missing", "start afresh"],
    "random cut": ["is not intact: rng_state.pth is cut short", "start afresh"],
    "random missing": ["is not intact: rng_state.pth is missing", "start afresh"],
}
