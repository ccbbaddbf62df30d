//! The driver's part of `--plug`: what the guest program does at `.Lmvm_plug`.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN};

use super::{check, Access, Driver, Failure};
use crate::memory::PAGE;
use crate::plan::{mix, param, step, PLUG_WORD};
use crate::plug::{command, reg, status, MAGIC};

impl Driver {
    /// Memory that comes while this runs, is used, and goes again.
    pub(super) fn plug(&mut self) -> Result<(), Failure> {
        let device = self.param(param::PLUG);
        let at = |reg: u32| device + u64::from(reg);
        let wish = |this: &Self, reg: u32, value: u32, want: u32| {
            this.send(Access::MmioWrite(at(reg), value));
            let got = this.ask(Access::MmioRead(at(reg::STATUS)));
            check(
                step::PLUG,
                u64::from(reg::STATUS),
                u64::from(want),
                u64::from(got),
            )
        };
        let words = |this: &Self, reg: u32| {
            let [low, high] =
                [reg, reg + 4].map(|reg| u64::from(this.ask(Access::MmioRead(at(reg)))));
            low | high << 32
        };
        let magic = u64::from(self.ask(Access::MmioRead(at(reg::MAGIC))));
        check(step::PLUG, u64::from(reg::MAGIC), u64::from(MAGIC), magic)?;
        wish(self, reg::COMMAND, command::PLUG, status::PLUGGED)?;
        let (start, size) = (words(self, reg::ADDRESS), words(self, reg::SIZE));
        let (first, kept) = (size / 2, size / 4);
        let blocks = |this: &Self, bytes: u64| {
            let block = u64::from(this.ask(Access::MmioRead(at(reg::BLOCK_SIZE))));
            bytes.checked_div(block).unwrap_or(0) as u32
        };
        wish(self, reg::BLOCKS, blocks(self, first), status::PLUGGED)?;
        for page in (start..start + first).step_by(PAGE as usize) {
            self.set_word(page + PLUG_WORD, mix(page + PLUG_WORD))?;
        }
        self.pass(param::PLUG_PASS, start)?;
        // The block behind has not come.
        self.refused(start + first)?;
        self.check_plugged(start, first)?;
        self.print(&format!(
            "plug   {} MiB came, were written and read\n",
            first >> 20
        ));
        // Half of those go again; the others are as they were.
        wish(self, reg::BLOCKS, blocks(self, kept), status::PLUGGED)?;
        self.refused(start + kept)?;
        self.check_plugged(start, kept)?;
        // And all the rest.
        wish(self, reg::COMMAND, command::UNPLUG, status::NONE)?;
        self.refused(start)?;
        self.print("unplug half of them, then all\n");
        Ok(())
    }

    /// A read to where there is no memory.
    fn refused(&mut self, at: u64) -> Result<(), Failure> {
        self.single(VIRTIO_BLK_T_IN, 0, Some([at, at]), VIRTIO_BLK_S_IOERR)
    }

    /// Checks the words of plugged pages.
    fn check_plugged(&mut self, start: u64, len: u64) -> Result<(), Failure> {
        for at in (start..start + len)
            .step_by(PAGE as usize)
            .map(|page| page + PLUG_WORD)
        {
            check(step::MEMORY, at, mix(at), self.word(at)?)?;
            self.plugged += 1;
        }
        Ok(())
    }
}
