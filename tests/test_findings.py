"""What reports of studies say in sentences."""

from amskv_jax.evaluation.findings import closer_than_full
from amskv_jax.evaluation.summary import StudyResults


def test_lower_distance_than_the_full_cache_is_explained():
    def record(section, label, seed, distance, recall):
        return {
            "name": f"{section}/{label}/seed{seed}",
            "section": section,
            "label": label,
            "position": 0,
            "seed": seed,
            "frechet_distance": distance,
            "recall": recall,
            "precision": 0.7,
        }

    full = [record("full", "full", seed, distance, 0.4) for seed, distance in ((0, 2.0), (1, 2.1))]
    better = record("c", "ams 70%", 0, 1.5, 0.5)
    within_noise = record("d", "h2o 50%", 0, 1.98, 0.6)
    text = closer_than_full(StudyResults((*full, better, within_noise)))
    assert "ams 70% (-25.0%). The full cache has precision 0.700 and recall 0.400" in text
    assert "these have recall 0.500 to 0.500" in text
    assert closer_than_full(StudyResults((*full, within_noise))) == ""
    assert closer_than_full(StudyResults((full[0], better))) == ""  # noise is not known
