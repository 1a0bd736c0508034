/* SPDX-License-Identifier: Apache-2.0
 *
 * memory.c: the boot data, the page tables above the first gigabyte, and who gets which memory.
 *
 * Page tables are written from ring 3: each directory is complete before it is linked, so that a hypervisor that
 * shadows page tables sees one write for each gigabyte.
 */
#include "guest.h"

#define GIB (1ull << 30)
#define LARGE (1ull << 21)
#define LIMIT (512 * GIB) /* one page-directory-pointer table */
#define MAX_MAP 32

struct start_info { /* hvm_start_info, version 1 */
    u32 magic, version, flags, modules;
    u64 modlist, cmdline, rsdp;
    u64 memmap;
    u32 entries, reserved;
};

struct map_entry {
    u64 base, size;
    u32 type, reserved;
};

extern u64 pdpt[512];
extern char image_end[];

static struct amig_range ram[MAX_MAP]; /* usable memory, sorted, page-aligned */
static u32 ram_count;
static u64 next_page; /* the first page that is not given away yet; always in the first range */

/* The first gigabyte is mapped; a host may keep the boot data anywhere below 4 GiB. */
static u64 boot_directory[4][512] __attribute__((aligned(4096)));

static void map_whole_gib(u64 address, u64 size)
{
    for (u64 g = address / GIB; g <= (address + size - 1) / GIB && g < 4; g++) {
        if (pdpt[g])
            continue;
        for (u64 i = 0; i < 512; i++)
            boot_directory[g][i] = g * GIB + i * LARGE + 0xe7;
        barrier();
        pdpt[g] = (u64)boot_directory[g] + 0x27;
    }
}

static void add_ram(u64 base, u64 size)
{
    u64 end = base + size;
    u32 i = ram_count;

    if (end < base || end > LIMIT)
        end = LIMIT;
    if (base < (u64)image_end)
        base = (u64)image_end;
    base = (base + AMIG_PAGE_SIZE - 1) & ~(u64)(AMIG_PAGE_SIZE - 1);
    end &= ~(u64)(AMIG_PAGE_SIZE - 1);
    if (base >= end || ram_count == MAX_MAP)
        return;
    for (; i && ram[i - 1].gpa > base; i--)
        ram[i] = ram[i - 1];
    ram[i].gpa = base;
    ram[i].pages = (end - base) / AMIG_PAGE_SIZE;
    ram_count++;
}

void memory_read_map(u32 address, char *cmdline, u32 size)
{
    const struct start_info *info = (const struct start_info *)(u64)address;
    const struct map_entry *map;
    u32 entries;

    map_whole_gib(address, sizeof(*info));
    if (info->cmdline && info->cmdline < 4 * GIB) {
        const char *from = (const char *)info->cmdline;
        u32 i = 0;

        map_whole_gib(info->cmdline, size);
        for (; i < size - 1 && from[i]; i++)
            cmdline[i] = from[i];
        cmdline[i] = 0;
    }
    entries = info->version >= 1 ? info->entries : 0;
    if (info->memmap >= 4 * GIB || entries > 1024)
        return;
    map = (const struct map_entry *)info->memmap;
    if (entries)
        map_whole_gib(info->memmap, entries * sizeof(*map));
    for (u32 i = 0; i < entries; i++)
        if (map[i].type == 1)
            add_ram(map[i].base, map[i].size);
}

/* Pages from the start of usable memory; 0 when there are no more. */
static u64 take(u64 pages)
{
    u64 at = next_page;

    if (!ram_count || at + pages * AMIG_PAGE_SIZE > ram[0].gpa + ram[0].pages * AMIG_PAGE_SIZE)
        return 0;
    next_page += pages * AMIG_PAGE_SIZE;
    return at;
}

static int map_ram(void)
{
    for (u32 r = 0; r < ram_count; r++) {
        u64 at = ram[r].gpa & ~(LARGE - 1);
        u64 end = ram[r].gpa + ram[r].pages * AMIG_PAGE_SIZE;

        for (; at < end; at += LARGE) {
            u64 *directory = (u64 *)(pdpt[at / GIB] & ~0xfffull);

            if (!directory) {
                u64 first = at & ~(GIB - 1);

                directory = (u64 *)take(1);
                if (!directory)
                    return 0;
                memset(directory, 0, AMIG_PAGE_SIZE);
                for (u64 a = at; a < end && a < first + GIB; a += LARGE)
                    directory[(a - first) / LARGE] = a + 0xe7;
                barrier();
                pdpt[at / GIB] = (u64)directory + 0x27;
            } else if (!directory[at / LARGE % 512]) {
                directory[at / LARGE % 512] = at + 0xe7;
            }
        }
    }
    return 1;
}

/* Cuts the working set out of memory, from `ws_from` up; what remains is the rest. */
static u64 cut(u64 pages)
{
    u64 left = pages;

    for (u32 r = 0; r < ram_count; r++) {
        u64 at = ram[r].gpa, end = at + ram[r].pages * AMIG_PAGE_SIZE;
        u64 from = at > plan.ws_from ? at : plan.ws_from;
        u64 to;

        if (from >= end || !left || plan.ws_ranges == AMIG_MAX_RANGES)
            from = to = end;
        else
            to = end - from > left * AMIG_PAGE_SIZE ? from + left * AMIG_PAGE_SIZE : end;
        if (to > from) {
            plan.ws_map[plan.ws_ranges].gpa = from;
            plan.ws_map[plan.ws_ranges++].pages = (to - from) / AMIG_PAGE_SIZE;
            left -= (to - from) / AMIG_PAGE_SIZE;
        }
        if (from > at && plan.rest_ranges < 2 * AMIG_MAX_RANGES) {
            plan.rest_map[plan.rest_ranges].gpa = at;
            plan.rest_map[plan.rest_ranges++].pages = (from - at) / AMIG_PAGE_SIZE;
        }
        if (end > to && plan.rest_ranges < 2 * AMIG_MAX_RANGES) {
            plan.rest_map[plan.rest_ranges].gpa = to;
            plan.rest_map[plan.rest_ranges++].pages = (end - to) / AMIG_PAGE_SIZE;
        }
    }
    return left;
}

int memory_plan(void)
{
    u64 total = 0, usable, rest = 0, pages;

    next_page = ram_count ? ram[0].gpa : 0;
    if (!map_ram()) {
        fail(AMIG_ERROR_MEMORY, "no room for page tables");
        return 0;
    }
    plan.ws_from = (plan.ws_from + AMIG_PAGE_SIZE - 1) & ~(u64)(AMIG_PAGE_SIZE - 1);
    for (u32 r = 0; r < ram_count; r++) {
        total += ram[r].pages;
    }
    total -= (next_page - (ram_count ? ram[0].gpa : 0)) / AMIG_PAGE_SIZE;
    STATUS->ram_pages = total;

    pages = plan.ws == ~0ull ? (plan.workload == AMIG_WORK_IDLE ? 0 : total / 2) : plan.ws / AMIG_PAGE_SIZE;
    if (pages >= 1ull << 32 || (plan.workload > AMIG_WORK_FILL && pages < plan.vcpus)) {
        fail(AMIG_ERROR_OPTION, "ws: at least a page for each vCPU, at most 16 TiB");
        return 0;
    }
    plan.ws_pages = pages;
    if (plan.workload == AMIG_WORK_CHECK) {
        u64 tables = 0;

        for (u32 c = 0; c < plan.vcpus; c++) {
            u64 bytes = (share(pages, c + 1) - share(pages, c)) * sizeof(u32);

            CPU(c)->gen_gpa = tables;
            tables += (bytes + AMIG_PAGE_SIZE - 1) / AMIG_PAGE_SIZE;
        }
        plan.gen_gpa = take(tables);
        if (!plan.gen_gpa) {
            fail(AMIG_ERROR_MEMORY, "no room for the generation tables: a smaller ws= or more memory");
            return 0;
        }
        for (u32 c = 0; c < plan.vcpus; c++)
            CPU(c)->gen_gpa = plan.gen_gpa + CPU(c)->gen_gpa * AMIG_PAGE_SIZE;
        STATUS->gen_gpa = plan.gen_gpa;
        STATUS->gen_pages = tables;
    }
    usable = next_page;
    if (ram_count) {
        ram[0].pages -= (usable - ram[0].gpa) / AMIG_PAGE_SIZE;
        ram[0].gpa = usable;
    }
    if (cut(pages)) {
        fail(AMIG_ERROR_MEMORY, "ws does not fit the memory: a smaller ws= or more memory");
        return 0;
    }
    for (u32 r = 0; r < plan.rest_ranges; r++)
        rest += plan.rest_map[r].pages;
    if (plan.fill == AMIG_FILL_NONE)
        plan.fill_pages = 0;
    else if (plan.fill_size == ~0ull)
        plan.fill_pages = pages;
    else
        plan.fill_pages = plan.fill_size / AMIG_PAGE_SIZE;
    if (plan.fill_pages > pages + rest) {
        fail(AMIG_ERROR_MEMORY, "fill_size does not fit the memory");
        return 0;
    }
    STATUS->ws_pages = pages;
    STATUS->fill_pages = plan.fill_pages;
    STATUS->ws_ranges = plan.ws_ranges;
    for (u32 r = 0; r < plan.ws_ranges; r++) {
        STATUS->ws[r].gpa = plan.ws_map[r].gpa;
        STATUS->ws[r].pages = plan.ws_map[r].pages;
    }
    for (u32 c = 0; c < plan.vcpus; c++) {
        CPU(c)->first_page = share(pages, c);
        CPU(c)->pages = share(pages, c + 1) - share(pages, c);
    }
    return 1;
}
