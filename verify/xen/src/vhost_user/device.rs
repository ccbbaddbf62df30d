//! The device: it returns the bytes of each request, inverted.

use std::io::{self, Read, Write};
use std::sync::RwLock;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, Reader, Writer};
use vm_memory::{
    GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`: addresses are grants.
const FEATURES: u64 = 1 << 32 | 1 << 33;
/// The largest request.
const MOST_BYTES: u64 = 64 << 10;

type Memory = GuestMemoryMmap<()>;

/// A device with one queue.
#[derive(Debug)]
pub struct Device {
    memory: Option<GuestMemoryAtomic<Memory>>,
    exit: RwLock<Option<(EventConsumer, EventNotifier)>>,
}

impl Device {
    /// Creates a device without memory.
    pub fn new() -> io::Result<Self> {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK)?;
        Ok(Self {
            memory: None,
            exit: RwLock::new(Some(exit)),
        })
    }

    /// Serves a request, and returns the number of bytes written.
    ///
    /// `Reader` and `Writer` of virtio-queue use the pointer of a guard and do not check its
    /// error. So they get memory that keeps its slices mapped, which returns the error before.
    fn serve(
        memory: &Memory,
        chain: &DescriptorChain<GuestMemoryLoadGuard<Memory>>,
    ) -> io::Result<u32> {
        let request = memory.held();
        let reader = Reader::new(&request, chain.clone()).map_err(io::Error::other)?;
        let mut writer = Writer::new(&request, chain.clone()).map_err(io::Error::other)?;
        let mut bytes = Vec::new();
        reader.take(MOST_BYTES).read_to_end(&mut bytes)?;
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        writer.write_all(&bytes)?;
        u32::try_from(bytes.len()).map_err(io::Error::other)
    }
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        usize::from(super::driver::SIZE)
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::XEN_MMAP | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.write().ok()?.take()
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let vring = vrings.first().ok_or(io::ErrorKind::NotFound)?;
        loop {
            let chain = {
                let mut vring = vring.get_mut();
                let queue = vring.get_queue_mut();
                let mut chains = queue.iter(memory.memory()).map_err(io::Error::other)?;
                chains.next()
            };
            let Some(chain) = chain else { return Ok(()) };
            let written = Self::serve(&memory.memory(), &chain).unwrap_or(0);
            vring
                .add_used(chain.head_index(), written)
                .map_err(io::Error::other)?;
            vring.signal_used_queue()?;
        }
    }
}
