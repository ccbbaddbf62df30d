# The built-in guest. guest_program.rs assembles it, and puts numbers for the names in braces.
#
# Registers throughout: RBX parameters, R12 virtio-mmio registers, R13 available index, R14 seed,
# R15 multiplier, R11 checksum, RBP the pass under way. On failure R10 is the step, R9 the place, RAX
# what was wanted, R8 what was there.

.pushsection .rodata.microvm_guest, "a", @progbits
.balign 16
.globl microvm_guest_start
microvm_guest_start:
    mov rbx, rdi
    mov r12, [rbx + {p_mmio}]
    mov r14, [rbx + {p_seed}]
    mov r15, [rbx + {p_mix}]
    xor r13d, r13d
    xor r11d, r11d
    lea rsi, [rip + .Lmvm_hello]
    call .Lmvm_puts

    # Memory: write everywhere first, so that regions which alias would show.
    call .Lmvm_fill
    call .Lmvm_verify
    lea rsi, [rip + .Lmvm_memory]
    call .Lmvm_puts
    mov rax, [{results} + {r_pages}]
    lea rsi, [rip + .Lmvm_written]
    call .Lmvm_number

    call .Lmvm_set_up
    lea rsi, [rip + .Lmvm_disk]
    call .Lmvm_puts
    mov rax, [rbx + {p_capacity}]
    lea rsi, [rip + .Lmvm_behind]
    call .Lmvm_number

    lea rbp, [rbx + {p_passes}]
    mov rcx, [rbx + {p_pass_count}]
.Lmvm_each_pass:
    push rcx
    call .Lmvm_pass
    pop rcx
    add rbp, {pass_len}
    dec rcx
    jnz .Lmvm_each_pass

    # A flush has no data; then three requests that must come back as errors.
    mov esi, 4
    xor edx, edx
    xor r8d, r8d
    xor edi, edi
    call .Lmvm_single
    lea rsi, [rip + .Lmvm_flush]
    call .Lmvm_puts
    lea rbp, [rbx + {p_passes} + {pass_len}]
    xor esi, esi
    mov rdx, [rbx + {p_capacity}]
    mov r8, [rbp + {w_low}]
    mov r9, [rbp + {w_high}]
    mov edi, 1
    call .Lmvm_single
    mov esi, {bad_type}
    xor edx, edx
    mov r8, [rbp + {w_low}]
    mov r9, [rbp + {w_high}]
    mov edi, 2
    call .Lmvm_single
    xor esi, esi
    xor edx, edx
    mov r8, [rbp + {w_low}]
    mov r9, [rbx + {p_hole}]
    mov edi, 1
    call .Lmvm_single
    lea rsi, [rip + .Lmvm_refuse]
    call .Lmvm_puts

    cmp qword ptr [rbx + {p_plug}], 0
    je .Lmvm_no_plug
    call .Lmvm_plug
.Lmvm_no_plug:

    # What the device wrote has not spilled over the pattern.
    call .Lmvm_verify
    lea rsi, [rip + .Lmvm_still]
    call .Lmvm_puts
    mov r10d, {s_done}
    xor r9d, r9d
    xor eax, eax
    xor r8d, r8d

# Ends the run: step in R10, place in R9, wanted in RAX, found in R8.
.Lmvm_fail:
    mov [{results} + {r_where}], r9
    mov [{results} + {r_want}], rax
    mov [{results} + {r_got}], r8
    mov [{results} + {r_step}], r10
    mov eax, r10d
    mov edx, {debug_exit}
    out dx, al
.Lmvm_halt:
    hlt
    jmp .Lmvm_halt

# Writes the pattern to the pages of both areas.
.Lmvm_fill:
    lea rsi, [rbx + {p_areas}]
    mov ecx, 2
.Lmvm_fill_area:
    mov rdi, [rsi]
    mov r9, [rsi + 8]
.Lmvm_fill_page:
    xor edx, edx
.Lmvm_fill_word:
    lea rax, [rdi + rdx]
    xor rax, r14
    imul rax, r15
    mov [rdi + rdx], rax
    add edx, {pattern_step}
    cmp edx, 4096
    jb .Lmvm_fill_word
    add rdi, [rsi + 16]
    dec r9
    jnz .Lmvm_fill_page
    add rsi, 24
    dec ecx
    jnz .Lmvm_fill_area
    ret

# Checks it.
.Lmvm_verify:
    lea rsi, [rbx + {p_areas}]
    mov ecx, 2
.Lmvm_verify_area:
    mov rdi, [rsi]
    mov rbp, [rsi + 8]
.Lmvm_verify_page:
    xor edx, edx
.Lmvm_verify_word:
    lea r9, [rdi + rdx]
    mov rax, r9
    xor rax, r14
    imul rax, r15
    mov r8, [r9]
    mov r10d, {s_memory}
    cmp r8, rax
    jne .Lmvm_fail
    add edx, {pattern_step}
    cmp edx, 4096
    jb .Lmvm_verify_word
    inc qword ptr [{results} + {r_pages}]
    add rdi, [rsi + 16]
    dec rbp
    jnz .Lmvm_verify_page
    add rsi, 24
    dec ecx
    jnz .Lmvm_verify_area
    ret

# Memory that comes while this runs, is used, and goes again.
# Frame: [rsp] where it begins, [rsp+8] bytes of the blocks that come first, [rsp+16] of those that stay.
.Lmvm_plug:
    sub rsp, 24
    mov rdi, [rbx + {p_plug}]
    mov r10d, {s_plug}
    mov r9d, {plug_magic_reg}
    mov r8d, [rdi + {plug_magic_reg}]
    mov eax, {plug_magic}
    cmp r8d, eax
    jne .Lmvm_fail
    mov dword ptr [rdi + {plug_command}], {plug_come}
    mov eax, {plug_there}
    call .Lmvm_plug_status
    mov eax, [rdi + {plug_address}]
    mov edx, [rdi + {plug_address} + 4]
    shl rdx, 32
    or rax, rdx
    mov [rsp], rax
    mov eax, [rdi + {plug_size}]
    mov edx, [rdi + {plug_size} + 4]
    shl rdx, 32
    or rax, rdx
    shr rax, 1
    mov [rsp + 8], rax
    shr rax, 1
    mov [rsp + 16], rax
    # Half of its blocks.
    mov rax, [rsp + 8]
    call .Lmvm_plug_want

    # A word in each page, and sectors of the disk beside some of them.
    mov rdi, [rsp]
    mov rcx, [rsp + 8]
    shr rcx, 12
.Lmvm_plug_fill:
    lea rdx, [rdi + {plug_word}]
    mov rax, rdx
    xor rax, r14
    imul rax, r15
    mov [rdx], rax
    add rdi, 4096
    dec rcx
    jnz .Lmvm_plug_fill
    mov rdx, [rsp]
    sub rsp, {pass_len}
    xor ecx, ecx
.Lmvm_plug_copy:
    mov rax, [rbx + rcx * 8 + {p_plug_pass}]
    mov [rsp + rcx * 8], rax
    inc ecx
    cmp ecx, {pass_words}
    jb .Lmvm_plug_copy
    add [rsp + {w_low}], rdx
    add [rsp + {w_high}], rdx
    mov rbp, rsp
    call .Lmvm_pass
    add rsp, {pass_len}
    # The block behind has not come.
    mov r8, [rsp]
    add r8, [rsp + 8]
    call .Lmvm_plug_bad
    mov rdi, [rsp]
    mov rcx, [rsp + 8]
    call .Lmvm_plug_verify
    lea rsi, [rip + .Lmvm_plugged]
    call .Lmvm_puts
    mov rax, [rsp + 8]
    shr rax, 20
    lea rsi, [rip + .Lmvm_mebibytes]
    call .Lmvm_number

    # Half of those go again; the others are as they were.
    mov rdi, [rbx + {p_plug}]
    mov rax, [rsp + 16]
    call .Lmvm_plug_want
    mov r8, [rsp]
    add r8, [rsp + 16]
    call .Lmvm_plug_bad
    mov rdi, [rsp]
    mov rcx, [rsp + 16]
    call .Lmvm_plug_verify

    # And all the rest.
    mov rdi, [rbx + {p_plug}]
    mov dword ptr [rdi + {plug_command}], {plug_go}
    mov eax, {plug_none}
    call .Lmvm_plug_status
    mov r8, [rsp]
    call .Lmvm_plug_bad
    lea rsi, [rip + .Lmvm_unplugged]
    call .Lmvm_puts
    add rsp, 24
    ret

# Wants the first RAX bytes of the region, of the device at RDI.
.Lmvm_plug_want:
    mov ecx, [rdi + {plug_block_size}]
    xor edx, edx
    div rcx
    mov [rdi + {plug_blocks}], eax
    mov eax, {plug_there}
    # Falls through to status.

# The device at RDI must have status EAX.
.Lmvm_plug_status:
    mov r10d, {s_plug}
    mov r9d, {plug_status}
    mov r8d, [rdi + {plug_status}]
    cmp r8d, eax
    jne .Lmvm_fail
    ret

# A read to R8, where there is no memory, must be refused.
.Lmvm_plug_bad:
    mov r9, r8
    lea rbp, [rbx + {p_passes}]
    xor esi, esi
    xor edx, edx
    mov edi, 1
    jmp .Lmvm_single

# Checks the words in the pages of the RCX bytes from RDI on.
.Lmvm_plug_verify:
    shr rcx, 12
.Lmvm_plug_verify_page:
    lea r9, [rdi + {plug_word}]
    mov rax, r9
    xor rax, r14
    imul rax, r15
    mov r8, [r9]
    mov r10d, {s_memory}
    cmp r8, rax
    jne .Lmvm_fail
    inc qword ptr [{results} + {r_plugged}]
    add rdi, 4096
    dec rcx
    jnz .Lmvm_plug_verify_page
    ret

# The register at offset R9 must have the value EAX in the bits EDX.
.Lmvm_expect:
    mov r8d, [r12 + r9]
    and r8d, edx
    mov r10d, {s_virtio}
    cmp r8d, eax
    jne .Lmvm_fail
    ret

# virtio 1.2, section 3.1.1: from reset to DRIVER_OK.
.Lmvm_set_up:
    mov edx, -1
    mov r9d, {magic_value}
    mov eax, {magic}
    call .Lmvm_expect
    mov r9d, {version_reg}
    mov eax, {version}
    call .Lmvm_expect
    mov r9d, {device_id}
    mov eax, 2
    call .Lmvm_expect
    mov dword ptr [r12 + {status}], 0
    mov dword ptr [r12 + {status}], 1
    mov dword ptr [r12 + {status}], 3
    # Bit 32 is VERSION_1, bit 9 FLUSH.
    mov dword ptr [r12 + {device_features_sel}], 1
    mov r9d, {device_features}
    mov eax, 1
    mov edx, eax
    call .Lmvm_expect
    mov dword ptr [r12 + {driver_features_sel}], 1
    mov [r12 + {driver_features}], eax
    mov dword ptr [r12 + {device_features_sel}], 0
    mov eax, 512
    mov edx, eax
    call .Lmvm_expect
    mov dword ptr [r12 + {driver_features_sel}], 0
    mov [r12 + {driver_features}], eax
    mov edx, -1
    mov r9d, {status}
    mov eax, 11
    mov [r12 + {status}], eax
    call .Lmvm_expect
    mov dword ptr [r12 + {queue_sel}], 0
    mov dword ptr [r12 + {queue_num}], {queue_size}
    mov rax, [rbx + {p_desc}]
    mov [r12 + {queue_desc}], eax
    shr rax, 32
    mov [r12 + {queue_desc} + 4], eax
    mov rax, [rbx + {p_avail}]
    mov [r12 + {queue_avail}], eax
    shr rax, 32
    mov [r12 + {queue_avail} + 4], eax
    mov rax, [rbx + {p_used}]
    mov [r12 + {queue_used}], eax
    shr rax, 32
    mov [r12 + {queue_used} + 4], eax
    mov dword ptr [r12 + {queue_ready}], 1
    mov r9d, {status}
    mov eax, 15
    mov [r12 + {status}], eax
    call .Lmvm_expect
    mov r9d, {config}
    mov eax, [rbx + {p_capacity}]
    call .Lmvm_expect
    mov r9d, {config} + 4
    mov eax, [rbx + {p_capacity} + 4]
    jmp .Lmvm_expect

# One pass, whose parameters RBP points to: batches of requests until all chunks are done.
# Frame: [rsp] first chunk of the batch, [rsp+8] size of the batch, [rsp+16] slot.
.Lmvm_pass:
    sub rsp, 24
    mov qword ptr [rsp], 0
.Lmvm_batch:
    mov rax, [rbp + {w_chunks}]
    sub rax, [rsp]
    jz .Lmvm_pass_done
    cmp rax, {slots}
    jbe .Lmvm_batch_fits
    mov eax, {slots}
.Lmvm_batch_fits:
    mov [rsp + 8], rax
    mov qword ptr [rsp + 16], 0
.Lmvm_submit:
    mov rax, [rsp]
    add rax, [rsp + 16]
    mov r10, [rbp + {w_before}]
    call .Lmvm_apply
    mov esi, [rbp + {w_type}]
    mov rcx, [rsp + 16]
    call .Lmvm_enqueue
    inc qword ptr [rsp + 16]
    mov rax, [rsp + 16]
    cmp rax, [rsp + 8]
    jb .Lmvm_submit
    # The device writes the data of a read, and the status byte.
    mov esi, {chunk} + 1
    cmp dword ptr [rbp + {w_type}], 0
    je .Lmvm_is_read
    mov esi, 1
.Lmvm_is_read:
    xor edi, edi
    mov rcx, [rsp + 8]
    call .Lmvm_kick
    mov qword ptr [rsp + 16], 0
.Lmvm_consume:
    mov rax, [rsp]
    add rax, [rsp + 16]
    mov r10, [rbp + {w_after}]
    call .Lmvm_apply
    cmp qword ptr [rbp + {w_after}], {op_sum}
    jne .Lmvm_no_stamp
    mov rax, [rsp]
    add rax, [rsp + 16]
    cmp rax, [rbx + {p_stamp_from}]
    jb .Lmvm_no_stamp
    mov rax, r8
    xor rax, r14
    imul rax, r15
    mov [r8], rax
.Lmvm_no_stamp:
    inc qword ptr [rsp + 16]
    mov rax, [rsp + 16]
    cmp rax, [rsp + 8]
    jb .Lmvm_consume
    add [rsp], rax
    jmp .Lmvm_batch
.Lmvm_pass_done:
    add rsp, 24
    # Say what it was; after the first read, the checksum must be right.
    lea rdi, [rip + .Lmvm_storm]
    lea rdx, [rip + .Lmvm_from]
    cmp qword ptr [rbp + {w_may_fail}], 0
    jne .Lmvm_say
    lea rdi, [rip + .Lmvm_read]
    lea rdx, [rip + .Lmvm_agrees]
    cmp qword ptr [rbp + {w_after}], {op_sum}
    je .Lmvm_check_sum
    lea rdi, [rip + .Lmvm_check]
    lea rdx, [rip + .Lmvm_compared]
    cmp qword ptr [rbp + {w_after}], {op_compare}
    je .Lmvm_say
    lea rdi, [rip + .Lmvm_write]
    lea rdx, [rip + .Lmvm_from]
    jmp .Lmvm_say
.Lmvm_check_sum:
    mov rax, [rbx + {p_sum}]
    mov r8, r11
    xor r9d, r9d
    mov r10d, {s_read}
    cmp r8, rax
    jne .Lmvm_fail
.Lmvm_say:
    push rdx
    mov rsi, rdi
    call .Lmvm_puts
    mov rax, [rbp + {w_chunks}]
    shl rax, {chunk_shift}
    pop rsi
    call .Lmvm_number
    cmp qword ptr [rbp + {w_after}], {op_none}
    jne .Lmvm_said
    mov rax, [rbp + {w_sector}]
    lea rsi, [rip + .Lmvm_on]
    call .Lmvm_number
.Lmvm_said:
    ret

# Does R10 to the buffers of chunk RAX. Returns them in R8 and R9, and the sector in RDX.
.Lmvm_apply:
    mov r8, rax
    imul r8, [rbp + {w_low_stride}]
    add r8, [rbp + {w_low}]
    mov r9, rax
    imul r9, [rbp + {w_high_stride}]
    add r9, [rbp + {w_high}]
    lea rdx, [rax * {chunk_sectors}]
    add rdx, [rbp + {w_sector}]
    test r10, r10
    jz .Lmvm_applied
    push rdx
    push r9
    push r8
    mov rdi, r8
    imul rsi, rdx, {sector_words}
    call .Lmvm_half
    mov rdi, [rsp + 8]
    call .Lmvm_half
    pop r8
    pop r9
    pop rdx
.Lmvm_applied:
    ret

# Does R10 to the half chunk at RDI, whose first word is word RSI of the disk.
.Lmvm_half:
    mov ecx, {half_words}
    cmp r10d, {op_sum}
    je .Lmvm_half_sum
.Lmvm_half_word:
    xor eax, eax
    cmp r10d, {op_wipe}
    je .Lmvm_half_store
    mov rax, rsi
    xor rax, r14
    imul rax, r15
    cmp r10d, {op_compare}
    je .Lmvm_half_compare
.Lmvm_half_store:
    mov [rdi], rax
.Lmvm_half_next:
    add rdi, 8
    inc rsi
    dec ecx
    jnz .Lmvm_half_word
    ret
.Lmvm_half_sum:
    # Four words at a time: where KVM emulates the guest, each instruction costs a microsecond.
    rol r11, 5
    xor r11, [rdi]
    imul r11, r15
    rol r11, 5
    xor r11, [rdi + 8]
    imul r11, r15
    rol r11, 5
    xor r11, [rdi + 16]
    imul r11, r15
    rol r11, 5
    xor r11, [rdi + 24]
    imul r11, r15
    add rdi, 32
    sub ecx, 4
    jnz .Lmvm_half_sum
    ret
.Lmvm_half_compare:
    mov r8, [rdi]
    cmp r8, rax
    je .Lmvm_half_next
    mov r9, rsi
    mov r10d, {s_write}
    jmp .Lmvm_fail

# Request ESI for sector RDX with buffers R8 and R9 (R8 = 0: none), alone; its status must be EDI.
.Lmvm_single:
    push rdi
    xor ecx, ecx
    call .Lmvm_enqueue
    pop rdi
    mov esi, 1
    mov ecx, 1
    # Falls through to kick.

# Publishes the last RCX requests, notifies, waits until they are used, and checks each: its place
# in the used ring, ESI bytes written by the device, status EDI.
.Lmvm_kick:
    mov rax, [rbx + {p_avail}]
    mov [rax + 2], r13w
    mov dword ptr [r12 + {queue_notify}], 0
    mov rdx, [rbx + {p_used}]
    mov r9d, 0x10000000
.Lmvm_poll:
    movzx r8d, word ptr [rdx + 2]
    cmp r8w, r13w
    je .Lmvm_used
    dec r9d
    jnz .Lmvm_poll
    mov r9d, r8d
    movzx eax, r13w
    mov r10d, {s_queue}
    jmp .Lmvm_fail
.Lmvm_used:
    mov r10d, {s_queue}
    mov r9d, {interrupt_status}
    mov r8d, [r12 + {interrupt_status}]
    mov eax, 1
    cmp r8d, eax
    jne .Lmvm_fail
    mov [r12 + {interrupt_ack}], r8d
    xor r8d, r8d
    mov r9d, r13d
    sub r9d, ecx
.Lmvm_check_used:
    # R9 counts ring indices, R8 slots from 0 to RCX.
    mov eax, r9d
    and eax, {queue_size} - 1
    push r8
    mov r10, r8
    shl r10, 2
    # What fails writes its status and nothing else.
    shl r8, 5
    add r8, [rbx + {p_requests}]
    movzx r8d, byte ptr [r8 + 16]
    cmp r8d, {io_error}
    mov r8d, 1
    je .Lmvm_status_alone
    mov r8d, esi
.Lmvm_status_alone:
    shl r8, 32
    or r10, r8
    mov r8, [rdx + rax * 8 + 4]
    mov rax, r10
    mov r10d, {s_queue}
    cmp r8, rax
    jne .Lmvm_fail
    pop r8
    mov rax, r8
    shl rax, 5
    add rax, [rbx + {p_requests}]
    movzx eax, byte ptr [rax + 16]
    cmp eax, edi
    jne .Lmvm_other_status
.Lmvm_good_status:
    inc qword ptr [{results} + {r_requests}]
    inc r9d
    inc r8d
    cmp r8, rcx
    jb .Lmvm_check_used
    ret
    # In a pass that may fail, an I/O error is as good as an answer.
.Lmvm_other_status:
    cmp eax, {io_error}
    jne .Lmvm_bad_status
    cmp qword ptr [rbp + {w_may_fail}], 0
    je .Lmvm_bad_status
    inc qword ptr [{results} + {r_failed}]
    jmp .Lmvm_good_status
.Lmvm_bad_status:
    mov r9, r8
    mov r8d, eax
    mov eax, edi
    mov r10d, {s_status}
    jmp .Lmvm_fail

# Puts request ESI for sector RDX with buffers R8 and R9 (R8 = 0: none) into slot RCX.
.Lmvm_enqueue:
    mov rax, rcx
    shl rax, 5
    add rax, [rbx + {p_requests}]
    mov [rax], esi
    mov dword ptr [rax + 4], 0
    mov [rax + 8], rdx
    mov byte ptr [rax + 16], 255
    # RDI: descriptor 4 * slot. R10: its number. Flags in the low half of the last word.
    mov rdi, rcx
    shl rdi, 6
    add rdi, [rbx + {p_desc}]
    lea r10d, [rcx * 4]
    mov [rdi], rax
    mov dword ptr [rdi + 8], 16
    lea edx, [r10 + 3]
    test r8, r8
    jz .Lmvm_enqueue_header
    # Data: readable for the device, or writable if this is a read.
    mov edx, 1
    test esi, esi
    jnz .Lmvm_enqueue_data
    mov edx, 3
.Lmvm_enqueue_data:
    mov [rdi + 16], r8
    mov dword ptr [rdi + 24], {half}
    mov [rdi + 28], dx
    lea esi, [r10 + 2]
    mov [rdi + 30], si
    mov [rdi + 32], r9
    mov dword ptr [rdi + 40], {half}
    mov [rdi + 44], dx
    inc esi
    mov [rdi + 46], si
    lea edx, [r10 + 1]
.Lmvm_enqueue_header:
    mov word ptr [rdi + 12], 1
    mov [rdi + 14], dx
    add rax, 16
    mov [rdi + 48], rax
    mov dword ptr [rdi + 56], 1
    mov dword ptr [rdi + 60], 2
    mov rax, [rbx + {p_avail}]
    mov edx, r13d
    and edx, {queue_size} - 1
    mov [rax + rdx * 2 + 4], r10w
    inc r13w
    ret

# Prints RAX in decimal, then the text at RSI.
.Lmvm_number:
    push rsi
    sub rsp, 24
    lea rsi, [rsp + 23]
    mov byte ptr [rsi], 0
    mov ecx, 10
.Lmvm_digit:
    xor edx, edx
    div rcx
    add dl, 48
    dec rsi
    mov [rsi], dl
    test rax, rax
    jnz .Lmvm_digit
    call .Lmvm_out
    add rsp, 24
    pop rsi
    jmp .Lmvm_out

# Prints the text at RSI when the transmitter is empty.
.Lmvm_puts:
    mov edx, {com1} + 5
    in al, dx
    test al, 0x20
    jz .Lmvm_puts
.Lmvm_out:
    mov edx, {com1}
.Lmvm_char:
    mov al, [rsi]
    test al, al
    jz .Lmvm_printed
    out dx, al
    inc rsi
    jmp .Lmvm_char
.Lmvm_printed:
    ret

.Lmvm_hello:    .asciz "64-bit guest, two RAM regions\n"
.Lmvm_memory:   .asciz "memory "
.Lmvm_written:  .asciz " pages written and read back\n"
.Lmvm_disk:     .asciz "disk   "
.Lmvm_behind:   .asciz " sectors behind virtio-mmio\n"
.Lmvm_read:     .asciz "read   "
.Lmvm_agrees:   .asciz " sectors, checksum agrees\n"
.Lmvm_write:    .asciz "write  "
.Lmvm_from:     .asciz " sectors from sector "
.Lmvm_on:       .asciz " on\n"
.Lmvm_storm:    .asciz "storm  "
.Lmvm_check:    .asciz "check  "
.Lmvm_compared: .asciz " sectors read back and compared\n"
.Lmvm_flush:    .asciz "flush  done\n"
.Lmvm_refuse:   .asciz "refuse 3 bad requests came back as errors\n"
.Lmvm_plugged:  .asciz "plug   "
.Lmvm_mebibytes: .asciz " MiB came, were written and read\n"
.Lmvm_unplugged: .asciz "unplug half of them, then all\n"
.Lmvm_still:    .asciz "memory still as written\n"
.globl microvm_guest_end
microvm_guest_end:
.popsection
