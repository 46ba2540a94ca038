//! Staging on a device whose memory the host cannot address and whose copies come late, among ranks
//! that are threads.

mod collectives;
mod direct;
mod examples;
mod failures;
mod messages;
mod rank;
mod whole;
