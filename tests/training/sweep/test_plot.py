"""The plot of a sweep: its lines, and that it is drawn whatever the points are."""

from lorakit.training.sweep.plot import TrialPoint, draw, lines_of


def point(parameters, score, **settings):
    return TrialPoint(settings=settings, parameters=parameters, score=score)


def test_the_plot_has_a_line_for_each_setting_but_the_rank():
    points = [
        point(rank * size, 0.5, **{"lora.rank": rank, "lora.targets": targets, "lora.alpha": rank})
        for targets, size in ((["q", "v"], 300), (["q"], 100))
        for rank in (8, 1)
    ]
    lines = lines_of(points)
    assert {name: [each.parameters for each in line] for name, line in lines.items()} == {
        "targets=q": [100, 800],
        "targets=q+v": [300, 2400],
    }


def test_a_plot_of_many_and_of_one_is_drawn_without_a_warning(tmp_path):
    many = [
        point(
            100 * rank + seed, rank / 9 + seed, **{"lora.rank": rank, "seed": seed, "x": "y" * 99}
        )
        for rank in (1, 2, 4, 8)
        for seed in range(5)
    ]
    for points in (many, many[:1]):
        draw(points, tmp_path / "plot.png", score_name="validation accuracy", title="title")
        assert (tmp_path / "plot.png").stat().st_size > 1000
