//! Modules with bytes or numbers changed at random.

use protobuf::MessageField;

use super::generator::Generator;
use super::{four, recording, with_config};
use crate::shape::tuple;
use crate::{Envelope, Options, rewrite};

/// Whatever the bytes are, there is an answer or an error.
#[test]
fn damaged_modules_never_panic() {
    let mut generator = Generator::new(99);
    for module in [
        recording!("every_kind"),
        recording!("nested"),
        recording!("train"),
        recording!("exchanges"),
        recording!("cuda/every_kind"),
    ] {
        let bytes = with_config(module);
        for _ in 0..1500 {
            let mut damaged = bytes.clone();
            for _ in 0..=generator.below(4) {
                let place = generator.below(damaged.len());
                match generator.below(3) {
                    0 => damaged[place] = generator.below(256) as u8,
                    1 => damaged.truncate(place.max(1)),
                    _ => damaged[place] ^= 1 << generator.below(8),
                }
            }
            let _ = rewrite(&damaged, &four());
        }
    }
}

/// Serialized programs come from files that anybody may have written.
#[test]
fn damaged_envelopes_never_panic() {
    let mut generator = Generator::new(7);
    let envelope = Envelope {
        optimized: with_config(recording!("local")),
        options: vec![1, 2, 3],
        callbacks: true,
    };
    let bytes = envelope.write().unwrap();
    for _ in 0..20_000 {
        let mut damaged = bytes.clone();
        for _ in 0..=generator.below(4) {
            // Mostly where lengths stand.
            let length = damaged.len();
            let beginning = generator.below(2) == 0;
            let place = generator.below(if beginning { length.min(24) } else { length });
            match generator.below(4) {
                0 => damaged[place] = 0xff,
                1 => damaged.truncate(place.max(1)),
                _ => damaged[place] ^= 1 << generator.below(8),
            }
        }
        if let Ok(Some(read)) = Envelope::read(&damaged) {
            let _ = rewrite(&read.optimized, &four());
            let _ = Options::read(&read.options);
        }
    }
}

/// As above, but well-formed: numbers are changed in the messages.
#[test]
fn inconsistent_modules_never_panic() {
    for seed in 1..3000 {
        let mut generator = Generator::new(seed);
        let mut module = match seed % 5 {
            0 => recording!("every_kind"),
            1 => recording!("nested"),
            2 => recording!("cuda/every_kind"),
            3 => recording!("exchanges"),
            _ => Generator::new(seed).module(true).0,
        };
        for _ in 0..3 {
            let computations = module.computations.len();
            let computation = &mut module.computations[generator.below(computations)];
            if computation.instructions.is_empty() {
                continue;
            }
            let place = generator.below(computation.instructions.len());
            let number = generator.below(40) as i64 - 3;
            let instruction = &mut computation.instructions[place];
            match generator.below(10) {
                0 => instruction.id = number,
                1 => instruction.operand_ids.push(number),
                2 => instruction.called_computation_ids.push(number),
                3 => instruction.operand_ids.clear(),
                4 => instruction.dimensions = vec![number],
                5 => instruction.shape = MessageField::some(tuple(vec![])),
                6 => instruction.called_computation_ids = vec![computation.id],
                7 => instruction.opcode = "all-gather".into(),
                8 => computation.root_id = number,
                _ => {
                    computation.instructions.remove(place);
                }
            }
        }
        let _ = rewrite(&with_config(module), &four());
    }
}
