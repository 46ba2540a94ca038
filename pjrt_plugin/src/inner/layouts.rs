//! The layouts that a program's results have, where a user or XLA chose another order of the dimensions
//! than row-major.

use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::{bytes, call, new_args, slice};
use crate::pjrt::extension::inner_layouts;

/// The order of the dimensions of each result, the fastest varying first; none if all are row-major,
/// as far as the inner plugin can tell.
///
/// # Safety
/// `executable` must be live.
pub unsafe fn of_outputs(executable: *mut PJRT_Executable) -> Result<Vec<Vec<i64>>, Error> {
    let Some(extension) = inner_layouts() else {
        return Ok(Vec::new());
    };
    let mut get = new_args::<PJRT_Layouts_PJRT_Executable_GetOutputLayouts_Args>();
    get.executable = executable;
    // SAFETY: as the caller promises; the layouts live as long as the executable, and each text until
    // its deleter is called.
    unsafe {
        call(extension.executable_get_output_layouts, &mut get)?;
        let layouts = slice(get.layouts, get.num_outputs);
        let mut orders = Vec::with_capacity(layouts.len());
        for &layout in layouts {
            let mut text = new_args::<PJRT_Layouts_MemoryLayout_Serialize_Args>();
            text.layout = layout;
            call(extension.memory_layout_serialize, &mut text)?;
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
