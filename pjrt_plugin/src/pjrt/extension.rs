//! The extension chain: the inner plugin's, without what would bypass us, and with a look at the
//! user data that JAX attaches to executions.

use pjrt_sys::*;

use crate::compile::partitioner;
use crate::ffi::callbacks;
use crate::inner::handles::DescriptionHandle;
use crate::inner::{extensions, on_gpu};
use crate::pjrt::device;
use crate::pjrt::entry::entry;
use crate::profiler;

/// Extensions we hide: transfers between processes that know nothing of MPI's topology, and the
/// profiler, which ours asks.
const HIDDEN: &[PJRT_Extension_Type] = &[
    PJRT_Extension_Type_CrossHostTransfers,
    PJRT_Extension_Type_Profiler,
];

/// Extensions whose functions take no device. On CPUs, where a device may be ours alone, no others
/// are shown but those with changes of ours.
const WITHOUT_DEVICES: &[PJRT_Extension_Type] = &[
    PJRT_Extension_Type_Custom_Partitioner,
    PJRT_Extension_Type_Layouts,
    PJRT_Extension_Type_RawBuffer,
    PJRT_Extension_Type_PhaseCompile,
    PJRT_Extension_Type_ExecutableMetadata,
    PJRT_Extension_Type_Callback,
    PJRT_Extension_Type_HostAllocator,
    SHARDINGS,
    ABI_VERSION,
    HOST_MEMORY_ALLOCATOR,
    XLA_TRANSFORM,
];

/// `PJRT_Extension_Type_Shardings` of newer headers than ours.
const SHARDINGS: PJRT_Extension_Type = 19;
/// `PJRT_Extension_Type_AbiVersion`.
const ABI_VERSION: PJRT_Extension_Type = 20;
/// `PJRT_Extension_Type_HostMemoryAllocator`.
const HOST_MEMORY_ALLOCATOR: PJRT_Extension_Type = 23;
/// `PJRT_Extension_Type_XlaTransform`.
const XLA_TRANSFORM: PJRT_Extension_Type = 24;

fn is_shown(kind: PJRT_Extension_Type) -> bool {
    let changed = [
        PJRT_Extension_Type_FFI,
        PJRT_Extension_Type_MemoryDescriptions,
    ];
    match on_gpu() {
        true => !HIDDEN.contains(&kind),
        false => changed.contains(&kind) || WITHOUT_DEVICES.contains(&kind),
    }
}

/// The inner plugin's chain with our changes. Its copy is leaked: the table lives as long as we.
pub fn chain() -> *mut PJRT_Extension_Base {
    let shown: Vec<_> = extensions::all()
        .filter(|(kind, _)| is_shown(*kind))
        .collect();
    let mut next = std::ptr::from_mut(Box::leak(Box::new(profiler()))).cast();
    if !on_gpu()
        && extensions::all().all(|(kind, _)| kind != PJRT_Extension_Type_Custom_Partitioner)
    {
        let partitioner = Box::leak(Box::new(custom_partitioner()));
        partitioner.base.next = next;
        next = std::ptr::from_mut(partitioner).cast();
    }
    for (kind, link) in shown.into_iter().rev() {
        // SAFETY: each link is as long as it says, and the type says which struct it is.
        unsafe {
            let copy = copy_words(link.cast(), (*link).struct_size).cast::<PJRT_Extension_Base>();
            (*copy).next = next;
            if kind == PJRT_Extension_Type_FFI {
                (*copy.cast::<PJRT_FFI_Extension>()).user_data_add = Some(user_data_add);
            }
            if kind == PJRT_Extension_Type_MemoryDescriptions {
                (*copy.cast::<PJRT_MemoryDescriptions_Extension>()).of_device =
                    Some(memory_descriptions);
            }
            next = copy;
        }
    }
    next
}

/// Ours, where the inner plugin lets nobody partition custom calls.
fn custom_partitioner() -> PJRT_Custom_Partitioner_Extension {
    PJRT_Custom_Partitioner_Extension {
        base: PJRT_Extension_Base {
            struct_size: size_of::<PJRT_Custom_Partitioner_Extension>(),
            type_: PJRT_Extension_Type_Custom_Partitioner,
            next: std::ptr::null_mut(),
        },
        register_custom_partitioner: Some(register_custom_partitioner),
        register_batch_partitionable: Some(register_batch_partitionable),
    }
}

/// Ours, with the inner plugin's behind it.
fn profiler() -> PJRT_Profiler_Extension {
    PJRT_Profiler_Extension {
        base: PJRT_Extension_Base {
            struct_size: size_of::<PJRT_Profiler_Extension>(),
            type_: PJRT_Extension_Type_Profiler,
            next: std::ptr::null_mut(),
        },
        profiler_api: profiler::table(),
        traceme_context_id: 0,
    }
}

/// A copy of a C struct.
///
/// # Safety
/// `from` must be valid for `size` bytes.
unsafe fn copy_words(from: *const u8, size: usize) -> *mut u64 {
    let words = size.div_ceil(size_of::<u64>());
    let storage = Box::leak(vec![0u64; words].into_boxed_slice()).as_mut_ptr();
    // SAFETY: the storage is aligned, and as long.
    unsafe { std::ptr::copy_nonoverlapping(from, storage.cast::<u8>(), size) };
    storage
}

entry! {
    /// `PJRT_DeviceDescription_MemoryDescriptions`
    pub fn memory_descriptions(
        args: PJRT_DeviceDescription_MemoryDescriptions_Args, device_description: DescriptionHandle
    ) {
        // SAFETY: live as well, and of the same kind.
        unsafe { args.members() }.device_description =
            device::description_like(device_description).raw();
        let of_device = extensions::memory_descriptions().and_then(|found| found.of_device);
        let done = args.pass_on(of_device);
        // SAFETY: as it was.
        unsafe { args.members() }.device_description = device_description.raw();
        done
    }

    /// `PJRT_Register_Custom_Partitioner`: the framework's XLA has the callbacks as well.
    pub fn register_custom_partitioner(
        args: PJRT_Register_Custom_Partitioner_Args; called: &[u8] = name, name_size
    ) {
        partitioner::register(called, true);
        Ok(())
    }

    /// `PJRT_Register_Batch_Partitionable`
    pub fn register_batch_partitionable(
        args: PJRT_Register_Batch_Partitionable_Args; called: &[u8] = name, name_size
    ) {
        partitioner::register(called, false);
        Ok(())
    }

    /// `PJRT_FFI_UserData_Add`
    pub fn user_data_add(args: PJRT_FFI_UserData_Add_Args) {
        callbacks::note_user_data(args.user_data.type_id);
        args.pass_on(extensions::ffi().and_then(|ffi| ffi.user_data_add))
    }
}
