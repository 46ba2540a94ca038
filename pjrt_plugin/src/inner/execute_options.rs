//! Copies of execute options that we may change and keep.

use std::ffi::{CStr, CString};

use pjrt_sys::PJRT_ExecuteOptions;

use super::call::{new_args, slice};

/// A copy of the framework's options, as long as it made them and at least as long as our header
/// has them: inner plugins refuse shorter ones, of older frameworks. What those do not say is zero.
pub struct ExecuteOptions {
    words: Vec<u64>,
    /// The copy points to it.
    not_donatable: Vec<i64>,
    /// The copy points to it.
    call_location: Option<CString>,
}

// SAFETY: pointers in the words are to what the struct owns, or to what its maker says is valid
// wherever it is used.
unsafe impl Send for ExecuteOptions {}

impl ExecuteOptions {
    /// Copies `options` for use while the framework's own are there.
    ///
    /// # Safety
    /// `options` must be valid for its `struct_size`.
    pub unsafe fn borrow(options: *const PJRT_ExecuteOptions) -> ExecuteOptions {
        // SAFETY: the size is the first member, which every version of the options has. The options
        // are that long, and the copy at least so.
        let copy = unsafe {
            let size = (*options).struct_size;
            let known = size.max(size_of::<PJRT_ExecuteOptions>());
            let mut copy = vec![0u64; known.div_ceil(size_of::<u64>())];
            let target = copy.as_mut_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(options.cast::<u8>(), target, size);
            copy[0] = known as u64;
            copy
        };
        ExecuteOptions {
            words: copy,
            not_donatable: Vec::new(),
            call_location: None,
        }
    }

    /// Copies `options` with what they point to, except for the context, and send and receive
    /// callbacks and tasks, of which there must be none.
    ///
    /// # Safety
    /// `options` must be valid for its `struct_size`.
    pub unsafe fn copy(options: *const PJRT_ExecuteOptions) -> ExecuteOptions {
        // SAFETY: lists and texts are valid while the framework's options are, that is, now.
        unsafe {
            let mut copy = ExecuteOptions::borrow(options);
            let inner = copy.get();
            let indices = slice(
                inner.non_donatable_input_indices,
                inner.num_non_donatable_input_indices,
            );
            let not_donatable = indices.to_vec();
            inner.non_donatable_input_indices = not_donatable.as_ptr();
            let location = (!inner.call_location.is_null())
                .then(|| CStr::from_ptr(inner.call_location).to_owned());
            inner.call_location = location
                .as_ref()
                .map_or(std::ptr::null(), |location| location.as_ptr());
            copy.not_donatable = not_donatable;
            copy.call_location = location;
            copy
        }
    }

    /// Forbids to donate the input of that index.
    pub fn forbid_donation(&mut self, index: usize) {
        self.not_donatable.push(index as i64);
        let (list, size) = (self.not_donatable.as_ptr(), self.not_donatable.len());
        let options = self.get();
        options.non_donatable_input_indices = list;
        options.num_non_donatable_input_indices = size;
    }

    /// None but the id of the launch.
    pub fn of_launch(launch_id: i32) -> ExecuteOptions {
        let mut options = new_args::<PJRT_ExecuteOptions>();
        options.launch_id = launch_id;
        // SAFETY: options of ours, as long as they say, which point to nothing.
        unsafe { ExecuteOptions::borrow(&options) }
    }

    /// Says with which id the program is launched.
    pub fn set_launch_id(&mut self, launch_id: i32) {
        self.get().launch_id = launch_id;
    }

    /// The options for the inner plugin; they live as long as this.
    pub fn raw(&mut self) -> *mut PJRT_ExecuteOptions {
        self.get()
    }

    fn get(&mut self) -> &mut PJRT_ExecuteOptions {
        // SAFETY: the words are at least as long, aligned, and a copy of valid options.
        unsafe { &mut *self.words.as_mut_ptr().cast::<PJRT_ExecuteOptions>() }
    }
}
