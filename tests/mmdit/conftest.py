import pytest

VARIANTS = {"sd3-medium": ((), False), "sd35-medium": ((0, 1), True), "sd35-large": ((), True)}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> (a pipeline of diffusers, the folder it was saved to); made when first asked for."""
    found = {}

    def get(name="sd35-large"):
        if name not in found:
            from tests.mmdit.pipelines import made  # needs diffusers, which other tests do not

            dual, qk_norm = VARIANTS[name]
            pipe, folder = made(dual, qk_norm), tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            found[name] = pipe, folder
        return found[name]

    return get
