// WMMA of wave32: D (16 x 16) = A (16 x 16) B (16 x 16) + C. AMD's guide, section 7.9:
//   A: lane l holds row l % 16, B: lane l holds column l % 16, 16 values of the inner dimension in order; lanes 16..31
//   have to hold what lanes 0..15 do.
//   C, D: register r of lane l holds row 2 r + l / 16, column l % 16.
// AMD does not say in which order floats are added; here every product is added in turn, in float.

#include "operands.h"

namespace rdna {
namespace {

void check_operand(const Wave& w, const Operand& o, int registers, const char* name) {
  for (int r = 0; r < registers; r++) {
    if (std::memcmp(w.v[o.reg + r], w.v[o.reg + r] + 16, 64) != 0) {
      fault("WMMA operand ", name, ": lanes 16..31 of v", std::to_string(o.reg + r), " differ from lanes 0..15");
    }
  }
}

void check(const Wave& w, const Instruction& in, int registers) {
  if (w.exec() != kAll) fault("WMMA with EXEC ", hex(w.exec()), ": all lanes have to be active");
  for (int k = 0; k < 2; k++) {
    if (in.src[k].kind != Operand::kVector) fault("WMMA operand that is no register");
    check_operand(w, in.src[k], registers, k == 0 ? "A" : "B");
  }
  if (in.clamp || in.op_sel != 0 || in.neg_hi != 0) fault("WMMA with these modifiers is not modelled");
}

float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <auto Convert>
void wmma_float(Wave& w, const Instruction& in) {
  check(w, in, 8);
  if (in.neg_lo != 0) fault("WMMA with negated operands is not modelled");
  float a[16][16], b[16][16];  // [row or column][inner]
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < 16; k++) {
      a[i][k] = Convert(static_cast<uint16_t>(w.v[in.src[0].reg + k / 2][i] >> (16 * (k % 2))));
      b[k][i] = Convert(static_cast<uint16_t>(w.v[in.src[1].reg + k / 2][i] >> (16 * (k % 2))));
    }
  }
  float room[8][kLanes];
  for (int r = 0; r < 8; r++) {
    uint32_t bits[kLanes];
    for (int l = 0; l < kLanes; l++) {
      bits[l] = in.src[2].kind == Operand::kVector ? w.v[in.src[2].reg + r][l] : scalar32(w, in.src[2]);
    }
    std::memcpy(room[r], bits, sizeof bits);
  }
  for (int m = 0; m < 16; m++) {
    float* d = &room[m / 2][16 * (m % 2)];  // 16 columns
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 16; n++) d[n] += a[m][k] * b[k][n];
    }
  }
  std::memcpy(w.v[in.dst.reg], room, sizeof room);
}

void wmma_i32_iu8(Wave& w, const Instruction& in) {
  check(w, in, 4);
  int32_t a[16][16], b[16][16];
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < 16; k++) {
      const uint8_t x = static_cast<uint8_t>(w.v[in.src[0].reg + k / 4][i] >> (8 * (k % 4)));
      const uint8_t y = static_cast<uint8_t>(w.v[in.src[1].reg + k / 4][i] >> (8 * (k % 4)));
      a[i][k] = in.neg_lo & 1 ? static_cast<int8_t>(x) : x;
      b[k][i] = in.neg_lo & 2 ? static_cast<int8_t>(y) : y;
    }
  }
  uint32_t room[8][kLanes];
  for (int r = 0; r < 8; r++) {
    for (int l = 0; l < kLanes; l++) {
      room[r][l] = in.src[2].kind == Operand::kVector ? w.v[in.src[2].reg + r][l] : scalar32(w, in.src[2]);
    }
  }
  for (int m = 0; m < 16; m++) {
    uint32_t* d = &room[m / 2][16 * (m % 2)];
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 16; n++) d[n] += static_cast<uint32_t>(a[m][k] * b[k][n]);
    }
  }
  std::memcpy(w.v[in.dst.reg], room, sizeof room);
}

}  // namespace

void add_matrix(Operations& t) {
  constexpr Type f = Type::kF32, u = Type::kU32;
  t.add("v_wmma_f32_16x16x16_f16", {wmma_float<half_to_float>, Class::kWmma, 1, {u, u, f}});
  t.add("v_wmma_f32_16x16x16_bf16", {wmma_float<bf16_to_float>, Class::kWmma, 1, {u, u, f}});
  t.add("v_wmma_i32_16x16x16_iu8", {wmma_i32_iu8, Class::kWmma, 1, {u, u, u}});
}

}  // namespace rdna
