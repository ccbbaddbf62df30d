//! The dirty log that a back end shares with its front end, for live migration.
//!
//! The front end allocates a log in a file, and sends it by `VHOST_USER_SET_LOG_BASE` (vhost-user
//! specification, "Migration"). In the log, the back end marks the pages that it writes. The front
//! end harvests it in each round.
//!
//! ```text
//!   back end                                   front end
//!
//!   GuestMemory ──► LogBitmap ──► SharedLog ═══ SharedLog ──► LogWords ──► DirtyMemory
//!     write           replace       mark    file   harvest      harvest_with
//! ```
//!
//! | type | use |
//! |---|---|
//! | [`SharedLog`] | the log, mapped from its file, in either process |
//! | [`LogBitmap`] | the bitmap of the back end's regions, whose log can be replaced |
//!
//! The documentation of the crate lists the [system calls](crate#system-calls).

mod bitmap;
mod error;
mod logs;
mod shared;
mod sync;
#[cfg(test)]
mod tests;

pub use bitmap::LogBitmap;
pub use error::LogError;
pub use shared::{SharedLog, LOG_PAGE_SIZE};
