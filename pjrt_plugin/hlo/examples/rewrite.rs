//! Rewrites a module, for a look at what comes out, or to compile it elsewhere.
//!
//! ```text
//! cargo run -p hlo_rewrite --example rewrite -- MODULE.hlo.pb REWRITTEN.hlo.pb DEVICES
//! ```
//!
//! Both files are serialized `HloModuleProto`s. The module must be partitioned for the devices 0 to
//! DEVICES - 1.

use std::process::ExitCode;

use hlo_rewrite::{Devices, rewrite, with_config};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to, devices] = &arguments[..] else {
        eprintln!("usage: rewrite MODULE REWRITTEN DEVICES");
        return ExitCode::from(2);
    };
    match run(from, to, devices) {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{from}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(from: &str, to: &str, devices: &str) -> Result<String, Box<dyn std::error::Error>> {
    let count: usize = devices.parse()?;
    let devices = Devices::new(1, count, (0..count as i64).collect())?;
    let rewritten = rewrite(&with_config(&std::fs::read(from)?)?, &devices)?;
    std::fs::write(to, &rewritten.module)?;
    Ok(rewritten.summary)
}
