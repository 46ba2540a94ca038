//! The extension chain: the inner plugin's, without what would bypass us, and with a look at the
//! user data that JAX attaches to executions.

use std::sync::atomic::{AtomicI64, Ordering};

use pjrt_sys::*;

use crate::boundary;
use crate::inner::call::call;

/// Extensions we hide: transfers between processes that know nothing of MPI's topology.
const HIDDEN: &[PJRT_Extension_Type] = &[PJRT_Extension_Type_CrossHostTransfers];

/// The type id under which the framework last attached user data (JAX: its host callbacks).
static USER_DATA_TYPE: AtomicI64 = AtomicI64::new(0);

/// The type id of the host callbacks, once some were attached.
pub fn user_data_type() -> i64 {
    USER_DATA_TYPE.load(Ordering::Acquire)
}

/// A copy of `chain` with our changes. The copies are leaked: the table lives as long as we.
pub fn chain(chain: *mut PJRT_Extension_Base) -> *mut PJRT_Extension_Base {
    let mut copies: Vec<*mut PJRT_Extension_Base> = Vec::new();
    let mut next = chain;
    // SAFETY: the chain is static in the inner plugin, each link valid for its struct_size.
    unsafe {
        while !next.is_null() {
            let link = &*next;
            if !HIDDEN.contains(&link.type_) {
                copies.push(copy(link));
            }
            next = link.next;
        }
        for pair in 0..copies.len() {
            (*copies[pair]).next = copies
                .get(pair + 1)
                .copied()
                .unwrap_or(std::ptr::null_mut());
            if (*copies[pair]).type_ == PJRT_Extension_Type_FFI {
                (*copies[pair].cast::<PJRT_FFI_Extension>()).user_data_add = Some(user_data_add);
            }
        }
    }
    copies.first().copied().unwrap_or(std::ptr::null_mut())
}

/// # Safety
/// `link` must be valid for its `struct_size`.
unsafe fn copy(link: &PJRT_Extension_Base) -> *mut PJRT_Extension_Base {
    let words = link.struct_size.div_ceil(size_of::<u64>());
    let storage = Box::leak(vec![0u64; words].into_boxed_slice()).as_mut_ptr();
    // SAFETY: the storage is aligned and long enough.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(link).cast::<u8>(),
            storage.cast::<u8>(),
            link.struct_size,
        );
    }
    storage.cast()
}

/// The FFI extension of the inner plugin.
pub fn inner_ffi() -> Option<&'static PJRT_FFI_Extension> {
    // SAFETY: the type says which struct it is.
    find(PJRT_Extension_Type_FFI).map(|found| unsafe { &*found.cast() })
}

/// The layouts extension of the inner plugin, if it has all that we use of it.
pub fn inner_layouts() -> Option<&'static PJRT_Layouts_Extension> {
    let found = find(PJRT_Extension_Type_Layouts)?;
    // SAFETY: the type says which struct it is, and it is as long as it says.
    unsafe { ((*found).struct_size >= size_of::<PJRT_Layouts_Extension>()).then(|| &*found.cast()) }
}

fn find(kind: PJRT_Extension_Type) -> Option<*const PJRT_Extension_Base> {
    let mut next = crate::plugin::plugin()
        .inner
        .api()
        .extension_start
        .cast_const();
    // SAFETY: see `chain`.
    unsafe {
        while !next.is_null() {
            if (*next).type_ == kind {
                return Some(next);
            }
            next = (*next).next;
        }
    }
    None
}

unsafe extern "C" fn user_data_add(args: *mut PJRT_FFI_UserData_Add_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments.
        USER_DATA_TYPE.store(unsafe { (*args).user_data.type_id }, Ordering::Release);
        // SAFETY: passed through.
        unsafe { call(inner_ffi().and_then(|ffi| ffi.user_data_add), args) }
    })
}
