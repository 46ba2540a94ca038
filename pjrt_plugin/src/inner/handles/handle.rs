//! A handle of the inner plugin as a typed value, of each kind.
//!
//! A handle is a pointer that the inner plugin gave out. It is live from then until it is
//! destroyed, and the inner plugin is thread-safe, so every thread may use it meanwhile. Whoever
//! has one knows why it is live: the framework passed it to the call that is running, or it is
//! [`Owned`], or it is kept (`launch/keep_alive.rs`). The methods rely on that; a handle is not
//! used after `destroy`. Devices and descriptions of other ranks may be ours instead
//! (`devices.rs`); those are only shown, and no method is called on them.

use std::ptr::NonNull;

use pjrt_sys::*;

use crate::error::Error;

/// Calls a function of the inner plugin with these members of its arguments, and has what it filled
/// in.
macro_rules! ask {
    ($function:ident { $($member:ident: $value:expr),* $(,)? }) => {
        // SAFETY: handles are live, see the top of this module; lists and texts are as long as is
        // said beside them, and outlive the call.
        unsafe {
            $crate::inner::call::ask($crate::inner::library::api().$function, |args| {
                $(args.$member = $value;)*
            })
        }
    };
}

/// What a C member of arguments becomes.
pub trait FromRaw<Raw>: Sized {
    /// The typed value.
    ///
    /// # Safety
    /// `raw` must be null or live for as long as the value is used.
    unsafe fn from_raw(raw: Raw) -> Result<Self, Error>;
}

/// A handle of any kind.
pub trait Handle: Copy {
    /// What tables know it by.
    fn address(self) -> usize;
}

/// Destroying a handle, once. What is destroyed is [`Owned`].
pub trait Destroy: Handle {
    /// Destroys it; a failure would leave nothing to do.
    ///
    /// # Safety
    /// Nobody else may destroy it, and nobody may use it from now on.
    unsafe fn destroy(self);
}

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident($raw:ident);)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(NonNull<$raw>);

        // SAFETY: only an address, and the inner plugin behind it is thread-safe.
        unsafe impl Send for $name {}
        // SAFETY: as for `Send`.
        unsafe impl Sync for $name {}

        impl $name {
            /// The pointer.
            pub fn raw(self) -> *mut $raw {
                self.0.as_ptr()
            }
        }

        impl Handle for $name {
            fn address(self) -> usize {
                self.0.as_ptr() as usize
            }
        }

        impl FromRaw<*mut $raw> for $name {
            unsafe fn from_raw(raw: *mut $raw) -> Result<Self, Error> {
                NonNull::new(raw).map($name).ok_or_else(|| {
                    Error::invalid(concat!("a null pointer in place of a ", stringify!($raw)))
                })
            }
        }

        impl FromRaw<*mut $raw> for Option<$name> {
            unsafe fn from_raw(raw: *mut $raw) -> Result<Self, Error> {
                Ok(NonNull::new(raw).map($name))
            }
        }
    )+};
}

handles! {
    /// A `PJRT_Client`.
    ClientHandle(PJRT_Client);
    /// A `PJRT_Device`; it lives as long as its client.
    DeviceHandle(PJRT_Device);
    /// A `PJRT_DeviceDescription`; it lives as long as its device or its topology.
    DescriptionHandle(PJRT_DeviceDescription);
    /// A `PJRT_TopologyDescription`.
    TopologyHandle(PJRT_TopologyDescription);
    /// A `PJRT_Memory`; it lives as long as its client.
    MemoryHandle(PJRT_Memory);
    /// A `PJRT_Buffer`.
    BufferHandle(PJRT_Buffer);
    /// A `PJRT_Event`.
    EventHandle(PJRT_Event);
    /// A `PJRT_Executable`, which is not loaded.
    ExecutableHandle(PJRT_Executable);
    /// A `PJRT_LoadedExecutable`.
    LoadedHandle(PJRT_LoadedExecutable);
    /// A `PJRT_ExecuteContext`.
    ContextHandle(PJRT_ExecuteContext);
}

macro_rules! shown {
    ($($name:ident)+) => {$(
        impl $name {
            /// A handle of ours with nothing behind it, which the inner plugin must not get.
            pub fn standing_at(place: &u64) -> $name {
                $name(NonNull::from(place).cast())
            }
        }
    )+};
}

shown! { DeviceHandle DescriptionHandle }

macro_rules! destroyed {
    ($($name:ident: $function:ident($member:ident);)+) => {$(
        impl Destroy for $name {
            unsafe fn destroy(self) {
                // Whoever destroys it is the last to use it.
                let _ = ask!($function { $member: self.raw() });
            }
        }
    )+};
}

destroyed! {
    ClientHandle: PJRT_Client_Destroy(client);
    BufferHandle: PJRT_Buffer_Destroy(buffer);
    EventHandle: PJRT_Event_Destroy(event);
    ExecutableHandle: PJRT_Executable_Destroy(executable);
    LoadedHandle: PJRT_LoadedExecutable_Destroy(executable);
    ContextHandle: PJRT_ExecuteContext_Destroy(context);
}

/// A handle that is destroyed when dropped.
#[derive(Debug)]
#[repr(transparent)]
pub struct Owned<H: Destroy>(H);

impl<H: Destroy> Owned<H> {
    /// Owns what the inner plugin has given to us.
    ///
    /// # Safety
    /// Nobody else may destroy it.
    pub unsafe fn new<Raw>(raw: *mut Raw) -> Result<Owned<H>, Error>
    where
        H: FromRaw<*mut Raw>,
    {
        // SAFETY: the caller got it from the inner plugin, so it is live until it is dropped.
        unsafe { H::from_raw(raw) }.map(Owned)
    }

    /// Owns what the framework gives up.
    ///
    /// # Safety
    /// Nobody else may destroy it.
    pub unsafe fn taken(handle: H) -> Owned<H> {
        Owned(handle)
    }

    /// The handle, which stays owned.
    pub fn get(&self) -> H {
        self.0
    }

    /// Gives the handle up to somebody who destroys it.
    pub fn release(self) -> H {
        let handle = self.0;
        std::mem::forget(self);
        handle
    }
}

impl<H: Destroy> Drop for Owned<H> {
    fn drop(&mut self) {
        // SAFETY: whoever made this has given it to nobody else.
        unsafe { self.0.destroy() };
    }
}
