//! The arguments of a launch as a typed borrow: the framework's, and those of launches of our own.
//! There is one device in each.

use std::ffi::CStr;
use std::marker::PhantomData;
use std::mem::offset_of;

use pjrt_sys::*;

use super::call::{call, new_args, slice};
use super::execute_options::ExecuteOptions;
use super::handles::{
    BufferHandle, ContextHandle, DeviceHandle, EventHandle, FromRaw, Handle, LoadedHandle, Owned,
};
use super::library::api;
use super::side_table::SideTable;
use crate::error::Error;

/// The arguments of `PJRT_LoadedExecutable_Execute` for one device.
pub struct ExecuteArgs<'a> {
    raw: &'a mut PJRT_LoadedExecutable_Execute_Args,
    /// What is launched.
    pub executable: LoadedHandle,
    /// The operands.
    pub inputs: &'a [BufferHandle],
    /// The execution context, which carries what the framework attaches to the launch.
    pub context: Option<ContextHandle>,
    /// The device, if the executable leaves it open.
    pub device: Option<DeviceHandle>,
}

/// The event of a launch's end.
#[derive(Debug)]
pub enum EndEvent {
    /// The framework has it too, and destroys it.
    Shared(EventHandle),
    /// Nobody else has it.
    Own(Owned<EventHandle>),
}

impl EndEvent {
    /// The event.
    pub fn handle(&self) -> EventHandle {
        match self {
            EndEvent::Shared(event) => *event,
            EndEvent::Own(event) => event.get(),
        }
    }

    /// The event, if nobody else has it.
    pub fn own(self) -> Option<Owned<EventHandle>> {
        match self {
            EndEvent::Shared(_) => None,
            EndEvent::Own(event) => Some(event),
        }
    }
}

/// The results of a launch, and the event of its end.
pub type TakenBack = (Vec<Owned<BufferHandle>>, Option<Owned<EventHandle>>);

impl<'a> ExecuteArgs<'a> {
    /// The typed borrow.
    ///
    /// # Safety
    /// The arguments must be what the function asks for, with one device, and with room for as many
    /// results as the executable has and, if events are asked for, for one.
    pub unsafe fn new(
        raw: &'a mut PJRT_LoadedExecutable_Execute_Args,
    ) -> Result<ExecuteArgs<'a>, Error> {
        // SAFETY: the handles live through the call, the one list has that many buffers, and a
        // handle is a pointer to a live one.
        unsafe {
            Ok(ExecuteArgs {
                executable: LoadedHandle::from_raw(raw.executable)?,
                inputs: match raw.num_args {
                    0 => &[],
                    number => slice((*raw.argument_lists).cast(), number),
                },
                context: FromRaw::from_raw((*raw.options).context)?,
                device: FromRaw::from_raw(raw.execute_device)?,
                raw,
            })
        }
    }

    /// The launches of its devices, of which each is one of these executables in turn.
    ///
    /// # Safety
    /// The arguments must be what the function asks for, with as many devices as there are
    /// executables, and each executable must take what its device is given. `rows` must be empty,
    /// and outlive the launches.
    pub unsafe fn of_each(
        given: &'a PJRT_LoadedExecutable_Execute_Args,
        executables: impl Iterator<Item = LoadedHandle>,
        rows: &'a mut Vec<PJRT_LoadedExecutable_Execute_Args>,
    ) -> Result<Vec<ExecuteArgs<'a>>, Error> {
        for (place, executable) in executables.enumerate() {
            let mut row = *given;
            row.executable = executable.raw();
            row.num_devices = 1;
            // SAFETY: the lists have a place for each device; there are no arguments' without any.
            unsafe {
                if !row.argument_lists.is_null() {
                    row.argument_lists = row.argument_lists.add(place);
                }
                row.output_lists = row.output_lists.add(place);
                if !row.device_complete_events.is_null() {
                    row.device_complete_events = row.device_complete_events.add(place);
                }
            }
            rows.push(row);
        }
        // SAFETY: each row is a launch on one device.
        rows.iter_mut()
            .map(|row| unsafe { ExecuteArgs::new(row) })
            .collect()
    }

    /// Takes back the results and the event that the launch has given, which the framework will not
    /// look at.
    pub fn take_back(&mut self) -> Result<TakenBack, Error> {
        let count = self.executable.executable()?.get().num_outputs()?;
        // SAFETY: the launch has filled in so many results, and an event if one was asked for;
        // since it is said to have failed, nobody else takes them.
        unsafe {
            let results = slice(*self.raw.output_lists, count).iter();
            let results = results
                .map(|&result| Owned::new(result))
                .collect::<Result<_, _>>()?;
            let event = match self.wants_event() {
                true => Some(Owned::new(*self.raw.device_complete_events)?),
                false => None,
            };
            Ok((results, event))
        }
    }

    /// Whether the framework wants the event of the launch's end.
    pub fn wants_event(&self) -> bool {
        !self.raw.device_complete_events.is_null()
    }

    /// Whether something runs beside the launch, which only its own options can call back.
    pub fn has_transfers(&self) -> bool {
        // SAFETY: the options are valid.
        let options = unsafe { &*self.raw.options };
        options.num_send_ops != 0 || options.num_recv_ops != 0 || options.num_tasks != 0
    }

    /// The line of the user's program that launches, where the framework says it.
    pub fn call_location(&self) -> &[u8] {
        const END: usize = offset_of!(PJRT_ExecuteOptions, call_location) + size_of::<usize>();
        // SAFETY: the options are valid for their size, and a text in them is NUL-terminated.
        unsafe {
            let options = self.raw.options;
            if (*options).struct_size < END || (*options).call_location.is_null() {
                return &[];
            }
            CStr::from_ptr((*options).call_location).to_bytes()
        }
    }

    /// The inputs that the framework forbids to donate.
    pub fn not_donatable(&self) -> &[i64] {
        // SAFETY: the options are valid, with a list that is as long as they say.
        unsafe {
            let options = &*self.raw.options;
            slice(
                options.non_donatable_input_indices,
                options.num_non_donatable_input_indices,
            )
        }
    }

    /// The options with what they point to, except for the context; for launches without
    /// transfers.
    pub fn copy_options(&self) -> ExecuteOptions {
        // SAFETY: the options are valid.
        unsafe { ExecuteOptions::copy(self.raw.options) }
    }

    /// Runs `body` with a copy of the options that carries `launch_id`.
    pub fn with_launch_id<T>(
        &mut self,
        launch_id: i32,
        body: impl FnOnce(&mut ExecuteArgs<'_>) -> T,
    ) -> T {
        // SAFETY: the options are valid, and live longer than the copy.
        let mut options = unsafe { ExecuteOptions::borrow(self.raw.options) };
        options.set_launch_id(launch_id);
        let user_options = std::mem::replace(&mut self.raw.options, options.raw());
        let result = body(self);
        self.raw.options = user_options;
        result
    }

    /// Passes the launch on as it is.
    pub fn pass_on(&mut self) -> Result<(), Error> {
        // SAFETY: valid arguments, see `new`.
        unsafe { call(api().PJRT_LoadedExecutable_Execute, self.raw) }
    }

    /// Gives the launch to the inner plugin; has the event of its end.
    pub fn execute(&mut self) -> Result<EndEvent, Error> {
        let mut event: *mut PJRT_Event = std::ptr::null_mut();
        let shared = self.wants_event();
        if !shared {
            self.raw.device_complete_events = &mut event;
        }
        let result = self.pass_on();
        // SAFETY: on success the inner plugin filled in an event. The framework destroys its own no
        // sooner than it has got it; the other is ours.
        let made = result.and_then(|()| unsafe {
            match *self.raw.device_complete_events {
                event if shared => EventHandle::from_raw(event).map(EndEvent::Shared),
                event => Owned::new(event).map(EndEvent::Own),
            }
        });
        if !shared {
            self.raw.device_complete_events = std::ptr::null_mut();
        }
        made
    }

    /// Gives the results to whoever launches, in order.
    ///
    /// # Errors
    /// If they are not as many as the executable has; then they stay where they are.
    pub fn give_results(&mut self, results: &mut Vec<Owned<BufferHandle>>) -> Result<(), Error> {
        // SAFETY: the executable is live, see `new`.
        let executable = unsafe { FromRaw::from_raw(self.raw.executable) };
        check_results(executable?, results.len())?;
        for (index, result) in results.drain(..).enumerate() {
            // SAFETY: the one list has room for every result of the executable.
            unsafe {
                (*self.raw.output_lists)
                    .add(index)
                    .write(result.release().raw())
            };
        }
        Ok(())
    }

    /// Gives the event of the end to whoever launches, if they want it.
    pub fn give_event(&mut self, event: Owned<EventHandle>) {
        if self.wants_event() {
            // SAFETY: there is room for the event of one device.
            unsafe { self.raw.device_complete_events.write(event.release().raw()) };
        }
    }
}

/// By loaded executable: how many results it has.
static RESULTS: SideTable<usize> = SideTable::new();

/// Whether a list of `given` results is as long as the executable's.
fn check_results(executable: LoadedHandle, given: usize) -> Result<(), Error> {
    let address = executable.address();
    if RESULTS.get(address) == Some(given) {
        return Ok(());
    }
    // What is known may be of a copy of ours that stood there before.
    let count = executable.executable()?.get().num_outputs()?;
    RESULTS.insert(address, count);
    if given == count {
        return Ok(());
    }
    Err(Error::internal(format!(
        "{given} results for an executable that has {count}"
    )))
}

/// A launch of our own.
pub struct OwnLaunch<'a> {
    executable: LoadedHandle,
    inputs: &'a [BufferHandle],
    options: *mut PJRT_ExecuteOptions,
    device: Option<DeviceHandle>,
    options_of: PhantomData<&'a ()>,
}

impl<'a> OwnLaunch<'a> {
    /// A launch with these options.
    pub fn new(
        executable: LoadedHandle,
        inputs: &'a [BufferHandle],
        options: &'a mut ExecuteOptions,
    ) -> OwnLaunch<'a> {
        OwnLaunch {
            executable,
            inputs,
            options: options.raw(),
            device: None,
            options_of: PhantomData,
        }
    }

    /// A launch of something else with the options of `args`.
    pub fn like(
        args: &'a ExecuteArgs<'_>,
        executable: LoadedHandle,
        inputs: &'a [BufferHandle],
    ) -> OwnLaunch<'a> {
        OwnLaunch {
            executable,
            inputs,
            options: args.raw.options,
            device: None,
            options_of: PhantomData,
        }
    }

    /// The same on this device.
    pub fn on(self, device: Option<DeviceHandle>) -> OwnLaunch<'a> {
        OwnLaunch { device, ..self }
    }

    /// Calls `launch` with the arguments. `results` gets what it makes: one for each result of the
    /// executable, all of them none before.
    ///
    /// # Errors
    /// If they are not as many as the executable has, and what `launch` says.
    pub fn run<T>(
        self,
        results: &mut [Option<Owned<BufferHandle>>],
        launch: impl FnOnce(&mut ExecuteArgs<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        check_results(self.executable, results.len())?;
        let argument_lists = [self.inputs.as_ptr()];
        // An owned buffer is a pointer, and none is null.
        let result_lists = [results.as_mut_ptr()];
        let mut raw = new_args::<PJRT_LoadedExecutable_Execute_Args>();
        raw.executable = self.executable.raw();
        raw.options = self.options;
        raw.argument_lists = argument_lists.as_ptr().cast();
        raw.num_devices = 1;
        raw.num_args = self.inputs.len();
        raw.output_lists = result_lists.as_ptr().cast();
        raw.execute_device = self.device.map_or(std::ptr::null_mut(), DeviceHandle::raw);
        // SAFETY: live handles, valid options, and lists of the lengths that the executable asks
        // for. The results are the inner plugin's, which nobody else has.
        launch(&mut unsafe { ExecuteArgs::new(&mut raw) }?)
    }
}
