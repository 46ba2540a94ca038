//! Communicators of the user's: their first use, and their end.

use super::Engine;
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::mpi::shim;

impl Engine {
    /// The number of the user's communicator `handle`, which is registered at first use.
    /// Nothing collective happens: it is used as it is.
    pub fn register(
        &self,
        handle: u64,
        name: &str,
        deleted: mpi_shim_abi::CommDeleted,
    ) -> Result<i64, Failure> {
        if let Some(number) = self.communicators.find(handle) {
            return Ok(number);
        }
        let Some(shim) = &self.calls.shim else {
            return Err("communicators need an MPI, and this process runs without one".into());
        };
        let (rank, size, inter) = shim.comm_info(handle)?;
        if inter {
            return Err("intercommunicators are not supported; use an intracommunicator".into());
        }
        let members = shim.comm_members(handle, size)?;
        let row = Communicator {
            // Few communicators live as long as the process; their names may.
            name: String::leak(name.to_owned()),
            handle,
            user_handle: handle,
            rank,
            size,
            members: Vec::leak(members.clone()),
            largest_tag: 0,
            freed: false,
        };
        let number = self.communicators.add_users(&members, row);
        shim.comm_watch(handle, number, deleted)?;
        Ok(number)
    }

    /// The user frees communicator `number`: waits for our operations if `may_wait`, then refuses
    /// later ones. Whether MPI must keep it for launches dispatched before.
    ///
    /// MPICH calls this when the last operation in progress on it ends, on that operation's own
    /// thread, which must not wait for itself: it is freed when the launches that may use it have
    /// ended.
    pub fn comm_deleted(&self, number: i64, may_wait: bool) -> bool {
        let executing = shim::is_in_call();
        if may_wait && !executing {
            self.order.wait_comm(number);
        }
        let comm = self.communicators.get(number);
        if !executing && let Some(comm) = &comm {
            // Open MPI 4.1 frees it under collectives that were started, and crashes in them.
            self.calls.wait_for_collectives(comm.handle, comm);
            self.calls.nonblocking.free(comm.handle);
        }
        if executing && let Some(comm) = comm {
            // What these launches still execute is compared, as on ranks that come here later.
            self.freed_comms
                .keep(number, comm.handle, || self.order.not_ended(number));
        } else {
            self.calls.comparison.free(number);
        }
        self.communicators.free(number);
        executing
    }
}
