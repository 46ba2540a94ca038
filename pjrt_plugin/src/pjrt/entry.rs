//! How C enters: one macro makes an entry of the function table from a body without raw pointers.

use std::ffi::c_char;
use std::ops::Deref;

use crate::error::Error;
use crate::inner::call::{Function, bytes, call};
use crate::inner::handles::{Destroy, FromRaw, Owned};

/// Arguments of a PJRT function that the framework has passed.
///
/// They are valid for that function, so they can only be changed by whoever keeps them so.
pub struct Passed<'a, Args>(&'a mut Args);

impl<Args> Passed<'_, Args> {
    /// The arguments behind `args`.
    ///
    /// # Safety
    /// They must be valid for the function that they are named after, and nobody else may use them
    /// meanwhile.
    pub unsafe fn new(args: *mut Args) -> Result<Self, Error> {
        // SAFETY: null, or valid and ours alone, as this function demands.
        let args = unsafe { args.as_mut() };
        args.map(Passed)
            .ok_or_else(|| Error::invalid("a null pointer in place of arguments"))
    }

    /// Passes the call on to the inner plugin, whose `function` these arguments are for.
    pub fn pass_on(&mut self, function: Function<Args>) -> Result<(), Error> {
        // SAFETY: valid arguments, see `new`; each type of arguments is of one function.
        unsafe { call(function, self.0) }
    }

    /// Passes the call on, and takes what the inner plugin has made out of `member`.
    ///
    /// # Safety
    /// `member` must be that in which the function gives what it makes, and change nothing.
    pub unsafe fn make<H: Destroy + FromRaw<*mut Raw>, Raw>(
        &mut self,
        function: Function<Args>,
        member: impl FnOnce(&mut Args) -> &mut *mut Raw,
    ) -> Result<Owned<H>, Error> {
        self.pass_on(function)?;
        let made = std::mem::replace(member(self.0), std::ptr::null_mut());
        // SAFETY: the inner plugin has just made it, and the framework has not got it.
        unsafe { Owned::new(made) }
    }

    /// The arguments to fill in or change.
    ///
    /// # Safety
    /// They must stay valid for their function: pointers and the sizes beside them belong together,
    /// and what the framework is given it may use.
    pub unsafe fn members(&mut self) -> &mut Args {
        self.0
    }

    /// The arguments for the inner plugin as they are.
    pub fn raw(&mut self) -> *mut Args {
        self.0
    }
}

impl<Args> Deref for Passed<'_, Args> {
    type Target = Args;

    fn deref(&self) -> &Args {
        self.0
    }
}

impl FromRaw<(*const c_char, usize)> for &[u8] {
    unsafe fn from_raw(raw: (*const c_char, usize)) -> Result<Self, Error> {
        // SAFETY: the list is as long as it says, and valid while it is used.
        Ok(unsafe { bytes(raw.0, raw.1) })
    }
}

/// Makes entries of the function table:
///
/// ```text
/// entry! {
///     /// `PJRT_X`
///     pub fn x(args: PJRT_X_Args, buffer: BufferHandle; text: &[u8] = text, text_size) { … }
/// }
/// ```
///
/// The body has the arguments as [`Passed`], the handles in the members named, and the lists made
/// of a pointer and a length. No panic leaves it, and its error is the framework's.
macro_rules! entry {
    ($(
        $(#[$doc:meta])*
        pub fn $name:ident(
            $args:ident: $Args:ty $(, $handle:ident: $Handle:ty)*
            $(; $list:ident: $List:ty = $pointer:ident, $size:ident)* $(;)?
        ) $body:block
    )+) => {$(
        $(#[$doc])*
        pub unsafe extern "C" fn $name(args: *mut $Args) -> *mut pjrt_sys::PJRT_Error {
            $crate::boundary::pjrt(|| {
                // SAFETY: the framework passes arguments that are valid for this function, with
                // live handles and lists that are as long as it says, until it returns
                // (`pjrt_c_api.h`).
                #[allow(unused_mut, unused_variables)]
                let (mut $args, $($handle,)* $($list,)*) = unsafe {
                    let passed = $crate::pjrt::entry::Passed::<$Args>::new(args)?;
                    $(let $handle = <$Handle as $crate::inner::handles::FromRaw<*mut _>>::from_raw(
                        passed.$handle as *mut _,
                    )?;)*
                    $(let $list = <$List as $crate::inner::handles::FromRaw<_>>::from_raw((
                        passed.$pointer,
                        passed.$size,
                    ))?;)*
                    (passed, $($handle,)* $($list,)*)
                };
                $body
            })
        }
    )+};
}

pub(crate) use entry;

/// Passes a call on with other serialized compile options than the framework's, unless they are
/// empty, and takes what the inner plugin has made out of the member named. Then the framework's
/// options are there again.
macro_rules! make_with_options {
    ($args:ident, $options:expr, $function:expr, $made:ident) => {{
        let options: &[u8] = $options;
        let given = ($args.compile_options, $args.compile_options_size);
        // SAFETY: the options are valid through the call, and the function, which is that of these
        // arguments, gives what it makes in that member.
        unsafe {
            if !options.is_empty() {
                let members = $args.members();
                members.compile_options = options.as_ptr().cast();
                members.compile_options_size = options.len();
            }
            let made = $args.make($function, |args| &mut args.$made);
            let members = $args.members();
            (members.compile_options, members.compile_options_size) = given;
            made
        }
    }};
}

pub(crate) use make_with_options;
