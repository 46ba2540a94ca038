//! The shared libraries of this process.

use std::ffi::{CStr, c_int};

/// Paths of the shared libraries now loaded in this process.
pub fn loaded() -> Vec<String> {
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut libc::c_void,
    ) -> c_int {
        // SAFETY: `data` is the vector below; glibc passes a valid info with a NUL-ended name.
        unsafe {
            let paths = &mut *data.cast::<Vec<String>>();
            paths.push(
                CStr::from_ptr((*info).dlpi_name)
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        0
    }
    let mut paths: Vec<String> = Vec::new();
    // SAFETY: the callback matches, and `paths` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(collect), std::ptr::from_mut(&mut paths).cast()) };
    paths
}
