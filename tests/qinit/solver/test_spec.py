from qinit.solver.spec import seed_of


def test_seeds_come_from_the_layer_s_name_and_the_run_s_seed():
    seeds = [
        seed_of("model.layers.0.q_proj", 0),
        seed_of("model.layers.1.q_proj", 0),
        seed_of("model.layers.0.q_proj", 1),
    ]
    assert len(set(seeds)) == 3
    assert seed_of("model.layers.0.q_proj", 0) == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator takes
