//! The layouts that a program's results have, where a user or XLA chose another order of the
//! dimensions than row-major.

use super::call::{ask, bytes, slice};
use super::extensions;
use super::handles::handle::ExecutableHandle;
use crate::error::Error;

/// The order of the dimensions of each result, the fastest varying first; none if all are
/// row-major, as far as the inner plugin can tell.
pub fn of_outputs(executable: ExecutableHandle) -> Result<Vec<Vec<i64>>, Error> {
    let Some(extension) = extensions::layouts() else {
        return Ok(Vec::new());
    };
    // SAFETY: the executable is live, and so are its layouts; each text is until its deleter is
    // called.
    unsafe {
        let outputs = ask(extension.executable_get_output_layouts, |args| {
            args.executable = executable.raw();
        })?;
        let layouts = slice(outputs.layouts, outputs.num_outputs);
        let mut orders = Vec::with_capacity(layouts.len());
        for &layout in layouts {
            let text = ask(extension.memory_layout_serialize, |args| {
                args.layout = layout
            })?;
            orders.push(order(bytes(
                text.serialized_bytes,
                text.serialized_bytes_size,
            )));
            if let Some(delete) = text.serialized_layout_deleter {
                delete(text.serialized_layout);
            }
        }
        Ok(orders)
    }
}

/// Reads `{0,1:E(4)}`.
fn order(text: &[u8]) -> Vec<i64> {
    let text = String::from_utf8_lossy(text);
    let numbers = text.trim_start_matches('{').split([':', '}']).next();
    numbers
        .unwrap_or_default()
        .split(',')
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_order_of_dimensions() {
        assert_eq!(order(b"{0,1}"), [0, 1]);
        assert_eq!(order(b"{2,0,1:T(8,128)E(4)}"), [2, 0, 1]);
        assert_eq!(order(b"{}"), [0i64; 0]);
        assert_eq!(order(b"{:E(4)}"), [0i64; 0]);
    }
}
