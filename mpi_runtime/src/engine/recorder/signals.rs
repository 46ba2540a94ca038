//! The signals at which the record is written.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use super::file;
use super::ring::Reason;

/// Signals that end a process, at which the record is written; whoever had a handler before gets
/// them then.
const FATAL: [c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGABRT,
];
/// Signals of others, whose handlers are left alone, unless they are the MPI's: MPICH has one for
/// SIGUSR1, which is called then.
const OTHERS: [c_int; 2] = [libc::SIGTERM, libc::SIGUSR1];

/// What was done at a signal before, by its number.
static BEFORE: [AtomicPtr<libc::sigaction>; 32] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; 32];

/// Installs the handlers.
pub(super) fn install() {
    for signal in FATAL.into_iter().chain(OTHERS) {
        let before = Box::leak(Box::new(action(libc::SIG_DFL)));
        // SAFETY: the structs are valid; see `on_signal` for what the handler does.
        unsafe {
            if libc::sigaction(signal, std::ptr::null(), before) != 0 {
                continue;
            }
            let is_free =
                before.sa_sigaction == libc::SIG_DFL || is_of_the_mpi(before.sa_sigaction);
            let is_ignored = before.sa_sigaction == libc::SIG_IGN;
            if is_ignored || OTHERS.contains(&signal) && !is_free {
                continue;
            }
            BEFORE[signal as usize].store(before, Ordering::Release);
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_signal;
            libc::sigaction(signal, &action(handler as usize), std::ptr::null_mut());
        }
    }
}

/// Whether a handler is in the library of the MPI.
fn is_of_the_mpi(handler: usize) -> bool {
    // SAFETY: dlsym and dladdr only look addresses up, whatever they are, and fill the struct.
    unsafe {
        let init = libc::dlsym(libc::RTLD_DEFAULT, c"MPI_Init".as_ptr());
        let file_of = |address: *const c_void| {
            let mut found: libc::Dl_info = std::mem::zeroed();
            (libc::dladdr(address, &mut found) != 0).then_some(found.dli_fbase)
        };
        !init.is_null() && file_of(handler as *const c_void) == file_of(init)
    }
}

fn action(handler: usize) -> libc::sigaction {
    // SAFETY: zeros are an action without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // On the stack for signals, if the thread has one: its own may be full.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    action
}

/// Calls nothing but what signal-safety(7) allows, and takes no lock.
extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: every thread has an errno.
    let errno = unsafe { *libc::__errno_location() };
    if signal == libc::SIGUSR1 {
        file::write(Reason::Request, signal);
        if has_another(signal) {
            pass_on(signal, info, context);
        }
    } else {
        // SIGTERM comes from whoever ends all ranks, and may be followed by SIGKILL.
        if file::write(Reason::Signal, signal) && signal != libc::SIGTERM {
            file::let_others_write();
        }
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Whether there was a handler for this signal before.
fn has_another(signal: c_int) -> bool {
    let before = BEFORE[signal as usize & 31].load(Ordering::Acquire);
    // SAFETY: it is null or was leaked.
    unsafe { before.as_ref() }.is_some_and(|before| before.sa_sigaction != libc::SIG_DFL)
}

/// Does what was done at this signal before.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE[signal as usize & 31].load(Ordering::Acquire);
    // SAFETY: it is null or was leaked. A handler is a function of the type that its flags say,
    // which is called as the system would.
    unsafe {
        match before.as_ref() {
            Some(before) if before.sa_sigaction != libc::SIG_DFL => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    type Long = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                    std::mem::transmute::<usize, Long>(before.sa_sigaction)(signal, info, context);
                } else {
                    type Short = extern "C" fn(c_int);
                    std::mem::transmute::<usize, Short>(before.sa_sigaction)(signal);
                }
            }
            _ => {
                // The signal is blocked until the handler returns, and then ends the process.
                libc::sigaction(signal, &action(libc::SIG_DFL), std::ptr::null_mut());
                libc::raise(signal);
            }
        }
    }
}
