//! Ranks that fit one line together, without Python: each has rows of its own, and the gradients
//! are added by an operation of mpi_cuda in the program (`step.mlir`).
//!
//! `mpirun -n 2 rust_client PATH/libpjrt_mpi_cuda.so`

use std::env;
use std::error::Error;

use pjrt::ProgramFormat::MLIR;
use pjrt::{Client, HostBuffer, LoadedExecutable, Program};

const STEP: &[u8] = include_bytes!("step.mlir");
const STEPS: usize = 200;
/// What the rows were made with, and what is found.
const LINE: [f32; 2] = [2.0, -1.0];

fn main() -> Result<(), Box<dyn Error>> {
    let library = env::args()
        .nth(1)
        .ok_or("usage: rust_client PATH/libpjrt_mpi_cuda.so")?;
    let api = pjrt::plugin(library).load()?;
    let client = Client::builder(&api).build()?;
    let rank = client.process_index();
    let ranks = client.devices().len();
    let step = LoadedExecutable::builder(&client, &Program::new(MLIR, STEP)).build()?;

    let rows: Vec<f32> = (0..8)
        .map(|i| ((i * 3 + rank * 5) % 7) as f32 / 7.0)
        .collect();
    let values: Vec<f32> = rows
        .chunks(2)
        .map(|row| row[0] * LINE[0] + row[1] * LINE[1])
        .collect();
    let rows = HostBuffer::builder().data(rows).dims([4, 2]).build();
    let values = HostBuffer::builder().data(values).build();

    let mut weights = HostBuffer::builder().data(vec![0.0f32; 2]).build();
    for _ in 0..STEPS {
        let inputs = [
            weights.copy_to_sync(&client)?,
            rows.copy_to_sync(&client)?,
            values.copy_to_sync(&client)?,
        ];
        let results = step.execution(inputs).run_sync()?;
        weights = results[0][0].copy_to_host_sync()?;
    }
    let HostBuffer::F32(weights) = weights else {
        return Err("the weights are not float32".into());
    };
    let [first, second] = weights.data() else {
        return Err("the weights are not two".into());
    };
    println!("rank {rank} of {ranks}: {first:.3} {second:.3}");
    Ok(())
}
