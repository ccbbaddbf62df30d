//! `log_debug!` and `log_warning!`: messages to the crate `log`, if the feature `log` is on.
//!
//! Accesses, lookups and other hot paths write no message.

#[cfg(feature = "log")]
macro_rules! log_debug {
    ($($message:tt)+) => {
        ::log::debug!($($message)+)
    };
}

#[cfg(feature = "log")]
macro_rules! log_warning {
    ($($message:tt)+) => {
        ::log::warn!($($message)+)
    };
}

#[cfg(not(feature = "log"))]
macro_rules! log_debug {
    ($($message:tt)+) => {
        if false {
            let _ = ::core::format_args!($($message)+);
        }
    };
}

#[cfg(not(feature = "log"))]
macro_rules! log_warning {
    ($($message:tt)+) => {
        if false {
            let _ = ::core::format_args!($($message)+);
        }
    };
}
