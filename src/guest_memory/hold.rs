//! [`TranslationHold`].

use core::any::Any;
use core::fmt::{self, Debug};
use std::sync::Arc;

/// Keeps translations of addresses in use until it, and its clones, are dropped.
///
/// From [`GuestMemory::hold_translation`](super::GuestMemory::hold_translation).
#[derive(Clone)]
pub struct TranslationHold(Option<Arc<dyn Any + Send + Sync>>);

impl TranslationHold {
    /// Holds nothing: for memory that translates nothing.
    pub fn nothing() -> Self {
        TranslationHold(None)
    }

    /// Holds `what`: for an IOMMU that counts who uses it.
    pub fn of(what: Arc<impl Any + Send + Sync>) -> Self {
        TranslationHold(Some(what))
    }
}

impl Debug for TranslationHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TranslationHold")
            .field("holds", &self.0.is_some())
            .finish()
    }
}
