//! [`Requests`]: the mappings that threads have requested, and that have not arrived.
//!
//! A thread *requests* a page that no other thread has requested. It *awaits* each page that it
//! misses, also one that another thread has requested. A mapping that arrives resolves the requests
//! of its pages whose access it permits, or all if it permits none. A thread that gives up takes
//! its requests back, so that the others request these pages themselves.

use std::collections::BTreeMap;

/// The smallest page of an IOMMU. Misses in one page are one request.
const PAGE: u64 = 0x1000;

/// The page of a miss, and the bits of the access. The reply to a request for reading may not
/// permit writing, so these are two requests.
type Page = (u64, u8);

/// A requested page, and the number of the request.
type Request = (Page, u64);

/// The requests that are not resolved.
#[derive(Debug, Default)]
pub(super) struct Requests {
    open: BTreeMap<Page, u64>,
    next: u64,
}

/// The requests that concern one thread.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Those that the thread made.
    made: Vec<Request>,
    /// Those that the thread waits for.
    awaited: Vec<Request>,
}

impl Requests {
    /// Returns whether there are none.
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Lets a thread wait for the page of `first`. Returns whether the thread must request it.
    pub(super) fn wait_for(&mut self, first: u64, access: u8, waits: &mut Waits) -> bool {
        let page = (first & !(PAGE - 1), access);
        let (is_new, number) = match self.open.get(&page) {
            Some(number) => (false, *number),
            None => {
                self.next = self.next.wrapping_add(1);
                self.open.insert(page, self.next);
                waits.made.push((page, self.next));
                (true, self.next)
            }
        };
        waits.awaited.push((page, number));
        is_new
    }

    /// Resolves requests of the pages that have an address from `first` to `last`.
    ///
    /// In each page, these are the requests whose access `permits` includes. The others wait for
    /// a reply of their own. If there are only others, this is the reply, and resolves them all.
    ///
    /// Returns whether there was one.
    pub(super) fn resolve(&mut self, first: u64, last: u64, permits: u8) -> bool {
        let is_permitted = |access: u8| access & !permits == 0;
        let mut any = false;
        let mut next = Some(first & !(PAGE - 1));
        while let Some(from) = next.filter(|from| *from <= last) {
            let Some(((page, _), _)) = self.open.range((from, 0)..=(last, u8::MAX)).next() else {
                break;
            };
            let page = *page;
            let of_page = || (page, 0)..=(page, u8::MAX);
            let accesses = || self.open.range(of_page()).map(|((_, access), _)| *access);
            let all = !accesses().any(is_permitted);
            while let Some((key, _)) = self
                .open
                .range(of_page())
                .find(|((_, access), _)| all || is_permitted(*access))
            {
                let key = *key;
                self.open.remove(&key);
                any = true;
            }
            next = page.checked_add(PAGE);
        }
        any
    }

    /// Takes back the requests that a thread made. Returns whether one was not resolved.
    pub(super) fn take_back(&mut self, waits: &mut Waits) -> bool {
        let mut any = false;
        for (page, number) in waits.made.drain(..) {
            if self.open.get(&page) == Some(&number) {
                self.open.remove(&page);
                any = true;
            }
        }
        waits.awaited.clear();
        any
    }

    /// Returns whether all requests that a thread waits for were resolved or taken back.
    ///
    /// Over the time of a wait, this takes time in proportion to the requests and the calls.
    pub(super) fn are_resolved(&self, waits: &mut Waits) -> bool {
        while let Some((page, number)) = waits.awaited.last() {
            if self.open.get(page) == Some(number) {
                return false;
            }
            waits.awaited.pop();
        }
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const READ: u8 = 1;
    const WRITE: u8 = 2;
    const BOTH: u8 = READ | WRITE;

    #[test]
    fn wait_for_same_page_and_access_is_one_request() {
        let mut requests = Requests::default();
        let (mut one, mut two) = (Waits::default(), Waits::default());
        assert!(requests.wait_for(0x1010, READ, &mut one));
        assert!(!requests.wait_for(0x1fff, READ, &mut two));
        assert!(requests.wait_for(0x1010, WRITE, &mut two));
        assert!(requests.wait_for(0x2000, READ, &mut two));
        assert!(!requests.are_resolved(&mut one));

        assert!(requests.resolve(0x1000, 0x1fff, BOTH));
        assert!(requests.are_resolved(&mut one));
        assert!(!requests.are_resolved(&mut two));
        assert!(
            !requests.resolve(0x1000, 0x1fff, BOTH) && !requests.resolve(0x3000, u64::MAX, BOTH)
        );
        assert!(requests.resolve(0x2fff, 0x2fff, BOTH));
        assert!(requests.are_resolved(&mut two) && requests.is_empty());
    }

    #[test]
    fn take_back_resolves_waits_of_others_and_no_later_request() {
        let mut requests = Requests::default();
        let (mut one, mut two) = (Waits::default(), Waits::default());
        assert!(requests.wait_for(0, READ, &mut one));
        assert!(!requests.wait_for(0, READ, &mut two));
        assert!(requests.take_back(&mut one));
        assert!(requests.are_resolved(&mut two));
        // Now the other thread requests the page.
        assert!(requests.wait_for(0, READ, &mut two));
        assert!(!requests.take_back(&mut one) && !requests.is_empty());

        // A request that was resolved and made again by another thread stays.
        assert!(requests.resolve(0, 0, BOTH));
        assert!(requests.wait_for(0, READ, &mut one));
        assert!(!requests.take_back(&mut two) && !requests.is_empty());
        assert!(requests.take_back(&mut one) && requests.is_empty());
    }

    #[test]
    fn resolve_at_end_of_address_space_removes_last_page() {
        let mut requests = Requests::default();
        let mut waits = Waits::default();
        assert!(requests.wait_for(u64::MAX, READ, &mut waits));
        assert!(!requests.resolve(0, u64::MAX - 0x1000, BOTH));
        assert!(requests.resolve(u64::MAX, u64::MAX, BOTH));
    }

    #[test]
    fn resolve_of_page_removes_requests_that_mapping_permits_or_all() {
        let mut requests = Requests::default();
        let (mut reads, mut writes) = (Waits::default(), Waits::default());
        for page in [0, 0x1000, u64::MAX] {
            assert!(requests.wait_for(page, WRITE, &mut writes));
            assert!(requests.wait_for(page, BOTH, &mut writes));
        }
        assert!(requests.wait_for(0x1000, READ, &mut reads));
        // The second page has a request that the mapping permits. The first one has none.
        assert!(requests.resolve(0, 0x1fff, READ));
        assert!(requests.are_resolved(&mut reads));
        assert_eq!(requests.open.len(), 4);
        // Its own reply does not permit writing either.
        assert!(requests.resolve(0x1000, 0x1000, READ));
        assert_eq!(requests.open.len(), 2);
        assert!(!requests.are_resolved(&mut writes));
        assert!(requests.resolve(0, u64::MAX, WRITE));
        assert!(!requests.are_resolved(&mut writes));
        assert!(requests.resolve(0, u64::MAX, WRITE));
        assert!(requests.are_resolved(&mut writes) && requests.is_empty());
    }
}
