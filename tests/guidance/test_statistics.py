import colorsys

import pytest
import torch

from trimtab.guidance.statistics import contrast, saturation


def test_saturation_is_the_mean_of_colorsys_s():
    images = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, :, 0, 0] = 0  # black has no hue: S is 0 there, not NaN
    expected = [
        sum(colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.permute(1, 2, 0).reshape(-1, 3).tolist()) / 20
        for image in images
    ]
    torch.testing.assert_close(saturation(images), torch.tensor(expected, dtype=torch.float64))


def test_contrast_is_the_deviation_of_luminance():
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    red, green, blue = images.unbind(1)
    expected = (0.299 * red + 0.587 * green + 0.114 * blue).flatten(1).std(dim=1, unbiased=False)
    torch.testing.assert_close(contrast(images), expected)


def test_more_vivid_and_more_contrasty_pictures_score_higher():
    images = 0.3 + 0.4 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    grey = images.mean(dim=1, keepdim=True)
    assert (saturation((grey + 1.5 * (images - grey)).clamp(0, 1)) > saturation(images)).all()
    assert (contrast((0.5 + 1.4 * (images - 0.5)).clamp(0, 1)) > contrast(images)).all()


@pytest.mark.parametrize("statistic", [saturation, contrast])
def test_half_precision_is_summed_in_float32(statistic):
    images = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    result = statistic(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), statistic(images.double()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", [saturation, contrast])
@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([[0.5]], TypeError, "got list"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), TypeError, "torch.uint8"),
        (torch.zeros(3, 2, 2), ValueError, r"\(3, 2, 2\)"),
        (torch.zeros(1, 4, 2, 2), ValueError, r"\(1, 4, 2, 2\)"),
        (torch.zeros(0, 3, 2, 2), ValueError, r"\(0, 3, 2, 2\)"),
        (torch.full((1, 3, 2, 2), 1.5), ValueError, "to 1.5"),
        (torch.full((1, 3, 2, 2), float("nan")), ValueError, "nan"),
    ],
)
def test_bad_images_are_named(statistic, images, error, words):
    with pytest.raises(error, match=f"`images`.*{words}"):
        statistic(images)
