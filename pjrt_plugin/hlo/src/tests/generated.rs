//! Generated modules.

use super::check::check;
use super::generator::Generator;
use super::{four, with_config};
use crate::rewrite;

#[test]
fn generated_modules_are_rewritten() {
    let mut most = 0;
    for seed in 1..400 {
        let (module, collectives) = Generator::new(seed).module(seed % 2 == 0);
        let rewritten = rewrite(&with_config(module), &four());
        let rewritten = rewritten.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        check(&rewritten);
        assert_eq!(rewritten.collectives, collectives, "seed {seed}");
        most = most.max(collectives);
    }
    assert!(most > 10, "the generator makes too little: {most}");
}

#[test]
fn control_dependencies_stay() {
    let mut edges = 0;
    for seed in 1..200 {
        let mut generator = Generator::new(seed + 1000);
        let (mut module, _) = Generator::new(seed).module(seed % 2 == 0);
        for computation in &mut module.computations {
            let ids: Vec<i64> = computation.instructions.iter().map(|i| i.id).collect();
            for (place, instruction) in computation.instructions.iter_mut().enumerate().skip(1) {
                if instruction.opcode != "parameter" && generator.below(3) == 0 {
                    let before = ids[generator.below(place)];
                    instruction.control_predecessor_ids.push(before);
                }
            }
        }
        let rewritten = rewrite(&with_config(module.clone()), &four());
        let out = check(&rewritten.unwrap_or_else(|error| panic!("seed {seed}: {error}")));
        for was in &module.computations {
            // How a collective reduced is no computation any more.
            let Some(is) = out.computations.iter().find(|is| is.id == was.id) else {
                continue;
            };
            let place = |id: i64| is.instructions.iter().position(|i| i.id == id);
            for instruction in &is.instructions {
                for before in &instruction.control_predecessor_ids {
                    let first = place(*before);
                    let own = place(instruction.id);
                    assert!(
                        first.is_some() && first < own,
                        "seed {seed}: {}",
                        instruction.name
                    );
                }
            }
            for instruction in &was.instructions {
                for before in &instruction.control_predecessor_ids {
                    let (first, second) = (place(*before).unwrap(), place(instruction.id).unwrap());
                    // What an instruction became begins with what takes over its dependencies.
                    let between = &is.instructions[..=second];
                    assert!(first < second, "seed {seed}");
                    assert!(
                        between
                            .iter()
                            .any(|i| i.control_predecessor_ids.contains(before)),
                        "seed {seed}: {} after {before}",
                        instruction.name
                    );
                    edges += 1;
                }
            }
        }
    }
    assert!(edges > 500, "{edges}");
}
