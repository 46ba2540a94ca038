//! Extensions of the inner plugin's table that we use ourselves.

use pjrt_sys::*;

use super::library::api;

/// The FFI extension.
pub fn ffi() -> Option<&'static PJRT_FFI_Extension> {
    // SAFETY: the type says which struct it is, and the chain is static.
    find(PJRT_Extension_Type_FFI).map(|found| unsafe { &*found.cast() })
}

/// The extension that describes memories, if it has all that we use of it.
pub fn memory_descriptions() -> Option<&'static PJRT_MemoryDescriptions_Extension> {
    let found = find(PJRT_Extension_Type_MemoryDescriptions)?;
    // SAFETY: as in `layouts`.
    unsafe {
        let size = size_of::<PJRT_MemoryDescriptions_Extension>();
        ((*found).struct_size >= size).then(|| &*found.cast())
    }
}

/// The layouts extension, if it has all that we use of it.
pub fn layouts() -> Option<&'static PJRT_Layouts_Extension> {
    let found = find(PJRT_Extension_Type_Layouts)?;
    // SAFETY: the type says which struct it is, and the chain is static; the struct is used if it
    // is long enough.
    unsafe { ((*found).struct_size >= size_of::<PJRT_Layouts_Extension>()).then(|| &*found.cast()) }
}

/// The functions of the inner plugin's profiler, if it has all that we use of them.
pub fn profiler() -> Option<&'static PLUGIN_Profiler_Api> {
    let found = find(PJRT_Extension_Type_Profiler)?;
    // SAFETY: as in `layouts`; the table that the extension names is static too.
    unsafe {
        let size = std::mem::offset_of!(PJRT_Profiler_Extension, traceme_context_id);
        if (*found).struct_size < size {
            return None;
        }
        let table = (*found.cast::<PJRT_Profiler_Extension>())
            .profiler_api
            .as_ref()?;
        (table.struct_size >= size_of::<PLUGIN_Profiler_Api>()).then_some(table)
    }
}

/// The extensions, one after the other, with their types.
pub fn all() -> impl Iterator<Item = (PJRT_Extension_Type, *const PJRT_Extension_Base)> {
    let mut next = api().extension_start.cast_const();
    std::iter::from_fn(move || {
        let this = next;
        // SAFETY: the chain is static in the inner plugin, and ends with null.
        let link = unsafe { this.as_ref() }?;
        next = link.next;
        Some((link.type_, this))
    })
}

fn find(kind: PJRT_Extension_Type) -> Option<*const PJRT_Extension_Base> {
    all().find(|link| link.0 == kind).map(|link| link.1)
}
