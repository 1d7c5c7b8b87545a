import pytest


@pytest.fixture(autouse=True, scope="session")
def _without_torch_compile():
    """gptqmodel compiles each layer's dequantize; PyTorch's own switch saves a minute of compiler here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield
