/* SPDX-License-Identifier: Apache-2.0
 *
 * main.c: ring 3 starts here, on every vCPU. vCPU 0 reads the boot data and makes the plan; the others wait for it.
 */
#include "guest.h"

struct plan plan;
volatile u32 plan_ready;
volatile u32 final_verify;

static char cmdline[2048];

extern u64 idt[32][2];
extern char fault_stubs[];

void greet(void);

/* The first complaint wins. */
void fail(u32 error, const char *message)
{
    u32 i = 0;

    if (STATUS->error)
        return;
    for (; message[i] && i < sizeof(STATUS->message) - 1; i++)
        STATUS->message[i] = message[i];
    STATUS->message[i] = 0;
    STATUS->error = error;
}

static void exceptions_setup(void)
{
    for (u32 n = 0; n < 32; n++) {
        u64 at = (u64)fault_stubs + n * 16;

        idt[n][1] = 0;
        idt[n][0] = (at & 0xffff) | (0x10ull << 16) | (0x8eull << 40) | ((at >> 16 & 0xffff) << 48);
    }
}

static void boot(u32 start_info)
{
    u64 began = rdtsc();

    memory_read_map(start_info, cmdline, sizeof(cmdline));
    memset((void *)AMIG_STATUS_GPA, 0, AMIG_SHARED_END - AMIG_STATUS_GPA);
    exceptions_setup();
    serial_setup();
    STATUS->abi = AMIG_GUEST_ABI;
    STATUS->image = AMIG_GUEST_IMAGE;
    STATUS->boot_tsc = began;
    for (u32 i = 0; i < sizeof(STATUS->cmdline) - 1 && cmdline[i]; i++)
        STATUS->cmdline[i] = cmdline[i];
    parse_cmdline(cmdline);
    tsc_setup();
    wait_setup();
    if (!STATUS->error)
        memory_plan();
    STATUS->workload = plan.workload;
    STATUS->write_mode = plan.write_mode;
    STATUS->fill = plan.fill;
    STATUS->vcpus = plan.vcpus;
    STATUS->tick_us = plan.tick_us;
    STATUS->slice_us = plan.slice_us;
    STATUS->hot_writes = plan.hot_writes;
    STATUS->hot_pages = plan.hot_pages;
    STATUS->seed = plan.seed;
    STATUS->rate_pages = plan.rate / AMIG_PAGE_SIZE;
    STATUS->state = STATUS->error ? AMIG_STATE_ERROR : AMIG_STATE_FILLING;
    for (u32 n = 0; n < plan.vcpus; n++)
        CPU(n)->tsc = began;
    barrier();
    STATUS->magic = AMIG_STATUS_MAGIC;
    if (STATUS->error) {
        struct line l = {0};

        line_text(&l, "amig-guest: ERROR ");
        line_text(&l, (const char *)STATUS->message);
        line_send(&l);
        plan_ready = 2;
        outl(AMIG_PORT_EXIT, 2);
        return;
    }
    greet();
    barrier();
    plan_ready = 1;
}

static void __attribute__((noreturn)) stay_idle(u32 cpu)
{
    for (;;)
        wait_tsc(cpu, plan.tick_tsc);
}

void cpu_main(u32 cpu, u32 start_info)
{
    volatile struct amig_cpu *c = CPU(cpu);

    if (!cpu)
        boot(start_info);
    while (!plan_ready)
        pause();
    if (cpu >= plan.vcpus)
        stay_idle(cpu); /* started without being announced by vcpus=N */
    c->tsc = rdtsc();
    if (plan_ready != 1) {
        c->state = AMIG_STATE_ERROR;
        stay_idle(cpu);
    }
    c->state = AMIG_STATE_FILLING;
    fill_share(cpu);
    c->state = AMIG_STATE_FILLED;
    while (STATUS->state != AMIG_STATE_RUNNING) {
        u64 now = wait_tsc(cpu, plan.hundred_us);

        if (!cpu)
            service(now);
    }
    c->state = AMIG_STATE_RUNNING;
    work(cpu);
}

/* An exception: the end of this vCPU's work. What happened stands in its block and, for vCPU 0, on the serial port. */
void __attribute__((noreturn)) fault_main(u32 cpu, u64 vector, u64 error, u64 rip, u64 cr2, u64 rsp)
{
    volatile struct amig_cpu *c = CPU(cpu);

    if (c->state != AMIG_STATE_FAULT) { /* a fault while telling of a fault is not told */
        struct line l = {0};

        c->fault_vector = vector;
        c->fault_error = error;
        c->fault_rip = rip;
        c->fault_cr2 = cr2;
        c->fault_rsp = rsp;
        barrier();
        c->state = AMIG_STATE_FAULT;
        line_text(&l, "FAULT");
        line_field(&l, "vector", vector);
        line_text(&l, " error=");
        line_hex(&l, error);
        line_text(&l, " rip=");
        line_hex(&l, rip);
        line_text(&l, " cr2=");
        line_hex(&l, cr2);
        line_field(&l, "cpu", cpu);
        line_send(&l);
    }
    if (!cpu) {
        STATUS->state = AMIG_STATE_FAULT;
        outl(AMIG_PORT_EXIT, 2);
    }
    for (;;) {
        if (STATUS->wait_port)
            outl(AMIG_PORT_WAIT, 100000);
        else
            pause();
    }
}

/* On purpose ("crash="), for those who test what surrounds the guest. */
void crash(u32 kind)
{
    if (kind == CRASH_SHUTDOWN) { /* no way to deliver the exception: a triple fault */
        memset(idt, 0, sizeof(idt));
        barrier();
    }
    if (kind)
        __asm__ volatile("ud2");
}
