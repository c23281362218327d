import pytest
import torch
from torch.nn import functional as F

from lit_multiip.data import mini_faces
from lit_multiip.evaluation.critic import Critic, CriticExtractor, named_attributes, shipped_critic


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "critic"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Critic("convnet", people=10).eval().save(folder)
    return CriticExtractor(str(folder))


def portraits(n):
    pixels = [torch.from_numpy(mini_faces.photo(0, index, 0)) for index in range(n)]
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()


def test_it_is_named_after_its_folder_and_states_its_classes(critic):
    assert (critic.name, critic.num_features, critic.num_classes, critic.can_identify) == ("critic", 64, 10, True)
    assert critic.source.endswith("critic")


def test_one_pass_is_what_the_critic_itself_says(critic):
    images = portraits(4)
    extraction = critic.extract(images)
    features, logits, _ = critic.critic(images)
    torch.testing.assert_close(extraction.features, 8 * F.normalize(features, dim=-1))  # 64 entries of unit variance
    assert torch.equal(extraction.logits, logits)
    torch.testing.assert_close(extraction.embedding, F.normalize(features, dim=-1))


def test_enlarged_portraits_score_as_the_originals(critic):
    images = portraits(4)
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # 256 px
    a, b = critic.extract(images).embedding, critic.extract(large).embedding
    strangers = (a[:-1] * a[1:]).sum(dim=1).max()
    assert (a * b).sum(dim=1).min() > strangers  # antialiasing blurs a little
    assert (a * b).sum(dim=1).min() > 0.99


def test_a_missing_critic_says_where_it_was_sought_and_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no critic in .*nowhere.*make-mini"):
        CriticExtractor(str(tmp_path / "nowhere"))


def test_the_shipped_critics_are_in_the_package():
    assert shipped_critic("critic_b").parts[-4:] == ("lit_multiip", "mini", "weights", "critic_b")


def test_every_visible_attribute_of_a_scene_is_read_from_its_prompt():
    for number in range(300):
        scene = mini_faces.scene(0, 1, number)
        visible = {name: scene.label(name) for name in mini_faces.SCENE_ATTRIBUTES}
        expected = {name: label for name, label in visible.items() if label is not None}
        assert named_attributes(mini_faces.prompt(scene)) == expected


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a photo of a person", {}),
        ("Portrait of a SMILING woman", {"expression": 1}),
        ("a smiling person wearing a scarf", {"scarf": 1}),  # nobody sees the smile
        ("a person wearing sunglasses and a hat, at night", {"sunglasses": 1, "hat": 1}),
        ("a photo of a person without a hat", {}),
        ("a person in a red shirt", {"shirt": 0}),
        ("a person in a reddish shirt", {}),
        ("a person in front of a white wall", {"background": 5}),
        ("a person in front of a red car", {}),
    ],
)
def test_free_prompts_count_only_what_they_name(prompt, named):
    assert named_attributes(prompt) == named


def test_agreement_is_the_share_of_named_attributes_that_are_read(critic):
    images = portraits(1).expand(3, -1, -1, -1).contiguous()
    heads = critic.critic(images)[2]
    wall, shirt = (int(heads[name][0].argmax()) for name in ("background", "shirt"))
    names = mini_faces.COLOUR_NAMES
    right, wrong = f"in a {names[shirt]} shirt", f"in a {names[shirt - 1]} shirt"
    behind = f"in front of a {names[wall]} wall"
    agreement = critic.prompt_agreement(images, [f"{right}, {behind}", f"{wrong}, {behind}", "a photo of a person"])
    assert agreement[:2].tolist() == [1.0, 0.5]
    assert agreement[2].isnan()
