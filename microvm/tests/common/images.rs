//! Kernel images, written byte by byte.

/// Returns `mov esi, [base + offset]`, which loads the pointer to a text from the structure at EBX
/// (or at RBX: the encoding is equal).
fn load_text(offset: u32) -> Vec<u8> {
    [&[0x8b, 0xb3][..], &offset.to_le_bytes()].concat()
}

/// Prints the text at ESI (or RSI) to port 0x3f8, up to its NUL, and a newline.
const PRINT: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz +3
    0xee, // out dx, al
    0xeb, 0xf8, // jmp -8
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
];

/// Ends the run with an exit code.
fn exit(code: u8) -> Vec<u8> {
    // mov edx, 0xf4; mov al, code; out dx, al; hlt
    vec![0xba, 0xf4, 0x00, 0x00, 0x00, 0xb0, code, 0xee, 0xf4]
}

/// The load address of both kernels.
const LOAD: u64 = 0x10_0000;

/// 32-bit code for PVH: checks the start info at EBX, prints command line and first module, and
/// writes a word to 6 MiB. Ends with exit code `code`.
pub fn pvh_code(code: u8) -> Vec<u8> {
    let mut bytes = vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33]; // cmp dword [ebx], the magic
    bytes.extend([0x74, 0x09]); // je over the failure
    bytes.extend(exit(99));
    bytes.extend(load_text(24));
    bytes.extend(PRINT);
    bytes.extend([0x83, 0x7b, 0x0c, 0x01]); // cmp dword [ebx + 12], 1: one module?
    bytes.extend([0x75, 5 + PRINT.len() as u8]); // jne
    bytes.extend([0x8b, 0x43, 0x10]); // mov eax, [ebx + 16]: the list of modules
    bytes.extend([0x8b, 0x30]); // mov esi, [eax]: the address of the first one
    bytes.extend(PRINT);
    bytes.extend([0x89, 0x1d, 0x00, 0x00, 0x60, 0x00]); // mov [0x600000], ebx
    bytes.extend(exit(code));
    bytes
}

/// Code that echoes the input of the serial port up to a newline, and ends with exit code 0.
pub const ECHO: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, // mov edx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz -5
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0x3c, 0x0a, // cmp al, '\n'
    0x75, 0xeb, // jne -21
    0xba, 0xf4, 0x00, 0x00, 0x00, // mov edx, 0xf4
    0x30, 0xc0, // xor al, al
    0xee, // out dx, al
    0xf4, // hlt
];

/// Returns an ELF file with `text` as its code, and a PVH note that may be left out.
pub fn elf(text: &[u8], note: bool) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let half = |n: u16| n.to_le_bytes();
    // Executable, x86-64, version 1.
    elf.extend([half(2), half(62), half(1), half(0)].concat());
    for word in [LOAD, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(
        [
            half(0),
            half(0),
            half(64),
            half(56),
            half(2),
            half(0),
            half(0),
            half(0),
        ]
        .concat(),
    );
    let (text_at, note_at) = (0x200_u64, 0x100_u64);
    let mut header = |kind: u32, at: u64, addr: u64, len: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        for word in [at, addr, addr, len, len, 1] {
            elf.extend(word.to_le_bytes());
        }
    };
    header(1, text_at, LOAD, text.len() as u64);
    header(if note { 4 } else { 0 }, note_at, 0, 20);
    elf.resize(note_at as usize, 0);
    // Name of 4 bytes, descriptor of 4, type 18: the physical 32-bit entry.
    for word in [4, 4, 18_u32] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(b"Xen\0");
    elf.extend((LOAD as u32).to_le_bytes());
    elf.resize(text_at as usize, 0);
    elf.extend(text);
    elf
}

/// Returns a bzImage with a 64-bit entry: one setup sector, then protected-mode code. The first 512
/// bytes of that are the 32-bit entry (here a triple fault), and the rest is the 64-bit one.
pub fn bzimage(xloadflags: u16) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup sectors
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20c_u16.to_le_bytes()); // boot protocol 2.12
    put(0x211, &[1]); // loaded high
    put(0x214, &(LOAD as u32).to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x236, &xloadflags.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    image.extend([0x0f, 0x0b]);
    image.resize(1024 + 512, 0);
    // 64-bit code. Instructions with the same encoding as in PVH share their bytes.
    image.extend([0x48, 0x89, 0xf3]); // mov rbx, rsi: the zero page
    image.extend([0x80, 0xbb, 0xe8, 0x01, 0x00, 0x00, 0x03]); // cmp byte [rbx + 0x1e8], 3
    image.extend([0x74, 0x09]); // je: three e820 entries
    image.extend(exit(99));
    image.extend(load_text(0x228)); // cmd_line_ptr
    image.extend(PRINT);
    image.extend(load_text(0x218)); // ramdisk_image
    image.extend([0x85, 0xf6, 0x74, PRINT.len() as u8]); // test esi, esi; jz: none
    image.extend(PRINT);
    // mov rax, 0x1_0060_0000; mov [rax], rbx: above 4 GiB, so paging reaches there.
    image.extend([
        0x48, 0xb8, 0x00, 0x00, 0x60, 0x00, 0x01, 0x00, 0x00, 0x00, 0x48, 0x89, 0x18,
    ]);
    image.extend(exit(0));
    image
}
